import { spawnSync } from 'node:child_process'
import { cpSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))
const library = new URL('../dist/lib/index.js', import.meta.url).href

function run(code: string, at = library) {
  const script = `import * as p2r from ${JSON.stringify(at)}\n${code}`
  const { status, signal, stdout, stderr } = spawnSync(
    process.execPath,
    ['--input-type=module', '-e', script],
    { encoding: 'utf8', timeout: 30_000 },
  )
  return { status, signal, stdout, stderr }
}
const clean = { status: 0, signal: null, stdout: '', stderr: '' }

test.each([
  ['importing alone', ''],
  ['a device left open', `p2r.openDevice('cpu')`],
  ['tensors left alive', `const x = p2r.openDevice('cpu').zeros([1000]); globalThis.x = x`],
  [
    'work still queued',
    `const d = p2r.openDevice('cpu'); let x = d.zeros([1 << 20])
     for (let i = 0; i < 50; i++) x = p2r.gelu({ x })`,
  ],
  [
    'a read that no one awaits',
    `const d = p2r.openDevice('cpu'); p2r.gelu({ x: d.zeros([1 << 20]) }).read()`,
  ],
  [
    'process.exit in the middle of it',
    `const d = p2r.openDevice('cpu'); let x = d.zeros([1 << 20])
     for (let i = 0; i < 50; i++) x = p2r.gelu({ x })
     x.read(); process.exit(0)`,
  ],
  [
    'dispose right after queueing',
    `const d = p2r.openDevice('cpu'); p2r.gelu({ x: d.zeros([1 << 20]) }).read(); d.dispose()`,
  ],
  [
    'devices collected with their work',
    `for (let i = 0; i < 50; i++) p2r.gelu({ x: p2r.openDevice('cpu').zeros([1000]) })`,
  ],
])('exits cleanly: %s', (_, code) => {
  expect(run(code)).toEqual(clean)
})

test('a pending promise keeps the process alive until it settles', () => {
  const result = run(
    `const d = p2r.openDevice('cpu'); let x = d.zeros([1 << 18])
     for (let i = 0; i < 50; i++) x = p2r.gelu({ x })
     d.synchronize().then(() => console.log('done'))`,
  )
  expect(result).toEqual({ ...clean, stdout: 'done\n' })
})

test('importing never throws; without the addon the first device call does', () => {
  const folder = mkdtempSync(join(tmpdir(), 'p2r-'))
  try {
    cpSync(join(root, 'dist/lib'), join(folder, 'dist/lib'), { recursive: true })
    cpSync(join(root, 'package.json'), join(folder, 'package.json'))
    symlinkSync(join(root, 'node_modules'), join(folder, 'node_modules'))
    const at = `file://${folder}/dist/lib/index.js`
    expect(run('', at)).toEqual(clean)
    const report = `for (const f of [p2r.devices, p2r.cudaStatus, p2r.openDevice])
      try { f() } catch (e) { console.log(e instanceof p2r.P2RError, e.code) }`
    expect(run(report, at)).toEqual({ ...clean, stdout: 'true ERR_NATIVE\n'.repeat(3) })
  } finally {
    rmSync(folder, { recursive: true })
  }
})
