import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import * as library from 'p2r-kernels'
import { expect, test } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))
const readme = readFileSync(join(root, 'README.md'), 'utf8')

test('the example runs unchanged', () => {
  const [, example] = readme.match(/```js\n([\s\S]*?)```/) ?? []
  const folder = mkdtempSync(join(tmpdir(), 'p2r-readme-'))
  try {
    mkdirSync(join(folder, 'node_modules'))
    symlinkSync(root, join(folder, 'node_modules/p2r-kernels'))
    writeFileSync(join(folder, 'example.mjs'), example!)
    const { status, stdout, stderr } = spawnSync(process.execPath, ['example.mjs'], {
      cwd: folder,
      encoding: 'utf8',
    })
    expect(stderr).toBe('')
    expect(status).toBe(0)
    expect(stdout).toMatch(/^(cpu|cuda:0) \[ 2784, 1536 \]/)
    expect(stdout).toMatch(/loss -?\d/)
  } finally {
    rmSync(folder, { recursive: true })
  }
})

test('the table lists every family of operations, and only existing functions', () => {
  const rows = [...readme.matchAll(/^\| `(\w+)` \| (.+?) \|/gm)]
  const families = readFileSync(join(root, 'ops/ops.def'), 'utf8').matchAll(/^OP\((\w+),/gm)
  expect(new Set(rows.map(([, family]) => family))).toEqual(
    new Set([...families].map(([, family]) => family)),
  )
  const exported = new Map<string, unknown>(Object.entries(library))
  for (const [, , functions] of rows)
    for (const [, name] of functions!.matchAll(/`([\w.]+)`/g))
      if (!name!.startsWith('Tensor.')) expect(exported.get(name!), name).toBeTypeOf('function')
})

test('its commands are scripts of the package', () => {
  const { scripts } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
  const named = [...readme.matchAll(/npm (?:run )?(demo|test|check|build|bench)\b/g)]
  expect(named.length).toBeGreaterThan(2)
  for (const [, name] of named) expect(scripts).toHaveProperty(name!)
})
