// The build from source: two ways with the same flags, and checkouts that move.
import { execFileSync } from 'node:child_process'
import {
  cpSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { found } from '../scripts/addon.mjs'

const root = fileURLToPath(new URL('..', import.meta.url))
const without = (...commands: string[]) => {
  const missing = commands.filter((command) => !found(command))
  return missing.length ? ` (skipped: needs ${missing.join(' and ')})` : ''
}

/** Of compile commands: the flags of each source and instruction set, in the order of the alphabet. */
function flagsOf(commands: readonly string[]): Map<string, string> {
  const all = new Map<string, string>()
  for (const command of commands) {
    const [, source] =
      command.match(/ (?:\S*\/)?((?:ops|cpu|binding|cuda)\/\S+\.(?:cpp|cc))(?= |$)/) ?? []
    const [isa] = command.match(/P2R_ISA=\w+/) ?? ['']
    const flags = command
      .match(/(?<= )-[A-Za-z]\S*/g)!
      .filter((flag) => !/^-(I|isystem|o|c|M.*|Werror)/.test(flag))
    all.set(`${source} ${isa}`, [...new Set(flags)].sort().join(' '))
  }
  return all
}

const makeless = without('make', 'cmake')
test.skipIf(makeless)(`Makefile and CMakeLists.txt agree on the flags${makeless}`, () => {
  const out = execFileSync('make', ['--dry-run', '--always-make', `NODE=${process.execPath}`], {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 1 << 26,
  })
  const byMake = flagsOf(out.split('\n').filter((line) => / -c -o /.test(line)))
  const commands = JSON.parse(readFileSync(join(root, 'build/compile_commands.json'), 'utf8'))
  const byCMake = flagsOf(
    (commands as { command: string; file: string }[])
      .filter(({ file }) => !/\.cu$|\/(test|scripts)\/|\/cuda\/(?!none)/.test(file))
      // The programs for a GPU compile some of the sources for themselves.
      .filter(({ command }) => !/ -o \S*device_runner\.dir\//.test(command))
      .map(({ command }) => command),
  )
  // A build for CUDA is without the file that stands in for it.
  byCMake.delete('cuda/none.cpp ')
  byMake.delete('cuda/none.cpp ')
  expect(byCMake.size).toBeGreaterThan(50)
  expect(byMake).toEqual(byCMake)
})

const cmakeless = without('cmake')
test.skipIf(cmakeless)(
  `a checkout that was copied with its build folder builds${cmakeless}`,
  () => {
    const copy = mkdtempSync(join(tmpdir(), 'p2r-moved-'))
    try {
      for (const path of [
        'ops',
        'cpu',
        'cuda',
        'binding',
        'scripts',
        'CMakeLists.txt',
        'package.json',
      ])
        cpSync(join(root, path), join(copy, path), { recursive: true })
      for (const path of ['build/CMakeCache.txt', 'build/CMakeFiles'])
        cpSync(join(root, path), join(copy, path), { recursive: true })
      writeFileSync(join(copy, 'build/addon.stamp'), '')
      symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'))
      const configure = `import { configure } from './scripts/addon.mjs'; configure({ cuda: 'off' })`
      const said = execFileSync(process.execPath, ['--input-type=module', '-e', configure], {
        cwd: copy,
        encoding: 'utf8',
      })
      expect(said).toMatch(/was made in another place, so it starts anew/)
      expect(readFileSync(join(copy, 'build/CMakeCache.txt'), 'utf8')).toContain(
        `CMAKE_HOME_DIRECTORY:INTERNAL=${copy}\n`,
      )
      expect(existsSync(join(copy, 'build/addon.stamp'))).toBe(false)
      // A second time it is left as it is.
      const again = execFileSync(process.execPath, ['--input-type=module', '-e', configure], {
        cwd: copy,
        encoding: 'utf8',
      })
      expect(again).not.toMatch(/another place/)
    } finally {
      rmSync(copy, { recursive: true })
    }
  },
)
