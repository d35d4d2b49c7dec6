import { spawnSync } from 'node:child_process'
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, expect, test } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'p2r-pack-'))
const installed = join(folder, 'node_modules/p2r-kernels')
const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))

function run(command: string, args: string[], cwd: string): string {
  const { status, stdout, stderr } = spawnSync(command, args, { cwd, encoding: 'utf8' })
  expect(status, stderr).toBe(0)
  return stdout
}

// What `npm install <tarball>` would lay out, with the dependencies linked instead of downloaded.
beforeAll(() => {
  const [{ filename }] = JSON.parse(
    run('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', folder], root),
  )
  mkdirSync(installed, { recursive: true })
  run('tar', ['-xzf', filename, '-C', installed, '--strip-components=1'], folder)
  for (const name of Object.keys(manifest.dependencies)) {
    const from = join(root, 'node_modules', name)
    if (existsSync(from)) symlinkSync(from, join(folder, 'node_modules', name))
  }
  symlinkSync(
    join(root, 'node_modules/file-uri-to-path'),
    join(folder, 'node_modules/file-uri-to-path'),
  )
  writeFileSync(join(folder, 'package.json'), '{ "private": true }')
})
afterAll(() => rmSync(folder, { recursive: true }))

test('the package has the files of its manifest, and the sources that build it', () => {
  for (const path of [...manifest.files, 'README.md', 'LICENSE', manifest.types])
    expect(existsSync(join(installed, path)), path).toBe(true)
  for (const sources of ['ops', 'cpu', 'cuda', 'binding'])
    expect(readdirSync(join(installed, sources), { recursive: true }).sort(), sources).toEqual(
      readdirSync(join(root, sources), { recursive: true }).sort(),
    )
  for (const path of ['test', 'node_modules', 'build', '.ci', 'lib'])
    expect(existsSync(join(installed, path)), path).toBe(false)
})

test('installing runs no script', () => {
  const { scripts, gypfile } = JSON.parse(readFileSync(join(installed, 'package.json'), 'utf8'))
  for (const name of ['preinstall', 'install', 'postinstall', 'prepare'])
    expect(scripts).not.toHaveProperty(name)
  expect(gypfile).toBe(false)
})

test('a fresh project imports and requires it', () => {
  const use = 'console.log(typeof p2r.openDevice, p2r.P2RError.name)'
  writeFileSync(join(folder, 'a.mjs'), `import * as p2r from 'p2r-kernels'\n${use}`)
  writeFileSync(join(folder, 'b.cjs'), `const p2r = require('p2r-kernels')\n${use}`)
  const [major, minor] = process.versions.node.split('.').map(Number)
  const flags = major === 20 && minor! < 19 ? ['--experimental-require-module'] : []
  for (const file of ['a.mjs', 'b.cjs'])
    expect(run(process.execPath, ['--no-warnings', ...flags, file], folder)).toBe(
      'function P2RError\n',
    )
})

test('its command runs, and a policy names the optional peer if it is missing', () => {
  const command = join(installed, manifest.bin['p2r-kernels'])
  expect(readFileSync(command, 'utf8')).toMatch(/^#!\/usr\/bin\/env node\n/)
  expect(run(process.execPath, [command, '--version'], folder)).toBe(`${manifest.version}\n`)
  writeFileSync(
    join(folder, 'e.mjs'),
    `import { OpenAIPolicy } from 'p2r-kernels'
     const policy = new OpenAIPolicy({ baseURL: 'http://127.0.0.1:1/v1', model: 'm' })
     const request = { role: 'reasoner', system: '', prompt: 'x', images: [] }
     await policy.generate(request).catch((e) => console.log(e.code, e.message))`,
  )
  expect(run(process.execPath, ['e.mjs'], folder)).toMatch(/^ERR_POLICY .*npm install openai/)
})

test('with the addon beside it, it computes', () => {
  const addon = 'build/Release/p2r_kernels.node'
  cpSync(join(root, addon), join(installed, addon))
  writeFileSync(
    join(folder, 'c.mjs'),
    `import { openDevice } from 'p2r-kernels'
     using_(openDevice('cpu'))
     async function using_(device) {
       console.log(...(await device.tensor([1, 2], [2]).cast('i32').read()))
       device.dispose()
     }`,
  )
  expect(run(process.execPath, ['c.mjs'], folder)).toBe('1 2\n')
})

test('only the entry and the manifest can be imported', () => {
  writeFileSync(
    join(folder, 'd.mjs'),
    `import 'p2r-kernels/package.json' with { type: 'json' }
     await import('p2r-kernels/dist/lib/native.js').catch((e) => console.log(e.code))`,
  )
  expect(run(process.execPath, ['--no-warnings', 'd.mjs'], folder)).toBe(
    'ERR_PACKAGE_PATH_NOT_EXPORTED\n',
  )
})
