import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import * as library from 'p2r-kernels'
import { expect, test } from 'vitest'

const folder = fileURLToPath(new URL('./consumer', import.meta.url))
const require = createRequire(import.meta.url)

test('a strict TypeScript project compiles against the built types', () => {
  const tsc = join(dirname(require.resolve('typescript/package.json')), 'bin/tsc')
  const { status, stdout } = spawnSync(process.execPath, [tsc, '-p', folder], { encoding: 'utf8' })
  expect(stdout).toBe('')
  expect(status).toBe(0)
})

test('the project uses every export', () => {
  const source = readdirSync(folder)
    .filter((name) => name.endsWith('.ts'))
    .map((name) => readFileSync(join(folder, name), 'utf8'))
    .join('\n')
  const imported = new Set(
    [...source.matchAll(/import \{([^}]*)\}/g)].flatMap(([, names]) =>
      names!.split(',').map((name) => name.replace('type ', '').trim()),
    ),
  )
  const values = Object.keys(library)
  const types = readFileSync(new URL('../dist/lib/index.d.ts', import.meta.url), 'utf8')
  const named = [...types.matchAll(/export (?:type )?\{([^}]*)\}/g)].flatMap(([, names]) =>
    names!.split(',').map((name) => name.replace('type ', '').trim()),
  )
  expect([...values, ...named].filter((name) => name && !imported.has(name))).toEqual([])
})
