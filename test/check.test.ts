import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'

const gate = fileURLToPath(new URL('../scripts/ptxas.mjs', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'p2r-check-'))
afterAll(() => rmSync(folder, { recursive: true }))

/** What the gate says to a compiler that writes this log for this source. */
function judge(log: string, source = '', status = 0) {
  const file = join(folder, 'kernel.cu')
  writeFileSync(file, source)
  const compiler = join(folder, 'compiler.mjs')
  writeFileSync(compiler, `process.stderr.write(${JSON.stringify(log)}); process.exit(${status})`)
  const result = spawnSync(process.execPath, [gate, process.execPath, compiler, file], {
    encoding: 'utf8',
  })
  return { status: result.status, said: result.stderr.replaceAll(folder, '') }
}

const account = (stores: number, loads: number) => `
ptxas info    : Compiling entry function '_Z6hungryPf' for 'sm_80'
ptxas info    : Function properties for _Z6hungryPf
    512 bytes stack frame, ${stores} bytes spill stores, ${loads} bytes spill loads
ptxas info    : Used 32 registers
`
const serialised =
  "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in function '_Z6hungryPf'\n"

test('a kernel without spills or serialised wgmma passes without output', () => {
  expect(judge(account(0, 0))).toEqual({ status: 0, said: '\n' })
})

test('spills and serialised wgmma fail the build, unless the source declares them', () => {
  for (const log of [account(8, 0), account(0, 4)]) {
    expect(judge(log)).toMatchObject({
      status: 1,
      said: expect.stringMatching(/_Z6hungryPf \(sm_80\) spills/),
    })
    expect(judge(log, '// ptxas: hungry spills\n').status).toBe(0)
    expect(judge(log, '// ptxas: hung spills\n').status).toBe(1)
    expect(judge(log, '// ptxas: hungry serialises\n').status).toBe(1)
  }
  expect(judge(serialised)).toMatchObject({ status: 1, said: expect.stringContaining('C7510') })
  expect(judge(serialised, '// ptxas: hungry serialises\n').status).toBe(0)
})

test('the compiler’s failures and warnings are passed on', () => {
  expect(judge('kernel.cu(1): error: no\n', '', 2)).toEqual({
    status: 2,
    said: 'kernel.cu(1): error: no\n',
  })
})
