import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'

const gate = fileURLToPath(new URL('../scripts/ptxas.mjs', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'p2r-check-'))
afterAll(() => rmSync(folder, { recursive: true }))

/** What the gate says to a compiler that writes this log for this source, and this code if it is kept. */
function judge(log: string, source = '', status = 0, { cubin = '', ptx = '' } = {}) {
  const file = join(folder, 'kernel.cu')
  writeFileSync(file, source)
  const compiler = join(folder, 'compiler.mjs')
  writeFileSync(
    compiler,
    `import { writeFileSync } from 'node:fs'
    const [folder] = process.argv.flatMap((arg) => arg.match(/^--keep-dir=(.*)/)?.[1] ?? [])
    if (folder) {
      writeFileSync(folder + '/kernel.compute_90a.ptx', ${JSON.stringify(ptx)})
      writeFileSync(folder + '/kernel.compute_90a.cubin', Buffer.from('${cubin}', 'base64'))
    }
    process.stderr.write(${JSON.stringify(log)})
    process.exitCode = ${status}`,
  )
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

// What matters of each instruction: opcode and modifiers.
const instructions = {
  ex2: [0x308, 0x800],
  rcp: [0x308, 0x1000],
  fence: [0x9c5, 0],
  wgmma: [0x9f0, 0],
  'wait 0': [0x9c5, 0x10000],
  'wait 1': [0x9c5, 0x10100],
} as const
type Instruction = keyof typeof instructions

/** An ELF file with one kernel, in base64. */
function cubinOf(code: readonly Instruction[]): string {
  const names = Buffer.from('\0.text._Z6hungryILi64EEvPf\0')
  const text = Buffer.alloc(16 * code.length)
  code.forEach((name, i) => {
    const [opcode, modifiers] = instructions[name]
    text.writeUInt32LE(0x7000 | opcode, 16 * i)
    text.writeUInt32LE(modifiers, 16 * i + 8)
  })
  const header = Buffer.alloc(64)
  header.writeBigUInt64LE(BigInt(64 + names.length + text.length), 0x28)
  header.writeUInt16LE(2, 0x3c)
  header.writeUInt16LE(0, 0x3e)
  const section = (name: number, start: number, size: number) => {
    const s = Buffer.alloc(64)
    s.writeUInt32LE(name, 0)
    s.writeBigUInt64LE(BigInt(start), 24)
    s.writeBigUInt64LE(BigInt(size), 32)
    return s
  }
  const sections = [section(0, 64, names.length), section(1, 64 + names.length, text.length)]
  return Buffer.concat([header, names, text, ...sections]).toString('base64')
}

const inPtx: Record<Instruction, string> = {
  ex2: 'ex2.approx.ftz.f32 %f1, %f2;',
  rcp: 'rcp.approx.ftz.f32 %f1, %f2;',
  fence: 'wgmma.fence.sync.aligned;',
  wgmma: 'wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%f1};',
  'wait 0': 'wgmma.wait_group.sync.aligned 0;',
  'wait 1': 'wgmma.wait_group.sync.aligned 1;',
}
const ptxOf = (code: readonly Instruction[]) =>
  `.visible .entry _Z6hungryILi64EEvPf(\n${code.map((name) => inPtx[name]).join('\n')}\n`

test('exponentials that do not overlap a product fail the build where the source demands it', () => {
  const written: Instruction[] = [
    ...(['fence', 'wgmma', 'wgmma', 'wait 1', 'ex2', 'ex2'] as const),
    ...(['wait 0', 'rcp', 'ex2', 'ex2'] as const),
  ]
  const late = [
    ...written.slice(0, 4),
    'wait 0',
    ...written.slice(4, 6),
    ...written.slice(7),
  ] as Instruction[]
  const judged = (demand: string, code: Instruction[], ptx = ptxOf(written)) =>
    judge('', `// ptxas: ${demand}\n`, 0, { cubin: cubinOf(code), ptx })
  expect(judged('hungry<64> overlaps 50 % of its exponentials', written)).toEqual({
    status: 0,
    said: '',
  })
  const { status, said } = judged(
    [
      'hungry overlaps 1 % of its exponentials',
      'hungry<72> overlaps 0 % of its exponentials',
      'hung overlaps 0 % of its exponentials',
    ].join('\n// ptxas: '),
    late,
  )
  expect(status).toBe(1)
  expect(said.trim().split('\n')).toEqual([
    expect.stringMatching(/_Z6hungryILi64EEvPf overlaps 0 % of its exponentials, not 1 %$/),
    expect.stringMatching(/there is no kernel hungry<72>/),
    expect.stringMatching(/there is no kernel hung /),
  ])
  // Another toolkit's opcodes are not taken for these.
  const demand = 'hungry overlaps 50 % of its exponentials'
  const other = judged(demand, written, ptxOf([...written, 'ex2']))
  expect(other).toMatchObject({ status: 1, said: expect.stringContaining('the PTX has') })
})
