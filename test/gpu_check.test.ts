// `npm run gpu:check` without a GPU: it reports that and fails; its steps with a runner that only
// pretends.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { cudaStatus } from 'p2r-kernels'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { gpuCheck, plan, runCommand, sanitizerWords } from '../scripts/gpu_check.mjs'

const root = fileURLToPath(new URL('..', import.meta.url))
let out: string
beforeEach(() => {
  out = mkdtempSync(join(tmpdir(), 'p2r-gpu-'))
})
afterEach(() => rmSync(out, { recursive: true }))

const { available } = cudaStatus()
test.skipIf(available)(
  `without a GPU it says so and fails${available ? ' (skipped: there is one here)' : ''}`,
  () => {
    const script = join(root, 'scripts/gpu_check.mjs')
    const { status, stderr } = spawnSync(process.execPath, [script, '--out', join(out, 'none')], {
      encoding: 'utf8',
    })
    expect(status).toBe(1)
    expect(stderr).toMatch(/^gpu:check needs a GPU: ./)
    expect(existsSync(join(out, 'none'))).toBe(false)
  },
)

test('an unknown option is refused', () => {
  const { status, stderr } = spawnSync(
    process.execPath,
    [join(root, 'scripts/gpu_check.mjs'), '--fast'],
    { encoding: 'utf8' },
  )
  expect([status, stderr]).toEqual([2, expect.stringContaining('--out DIR')])
})

const machine = { devices: 'cuda:0 a GPU (9.0)', node: 'v0' }

/** A runner that writes what the step's program would, and takes so many seconds of a pretended clock. */
function pretended(results: Record<string, { seconds?: number; status?: number; files?: object }>) {
  let clock = 0
  const seen: { command: string[]; seconds: number; cuda: string | undefined }[] = []
  return {
    seen,
    now: () => clock,
    async run(
      command: string[],
      { log, seconds, env }: { log: string; seconds: number; env: NodeJS.ProcessEnv },
    ) {
      const name = log.replace(/^.*\/|\.log$/g, '')
      const { seconds: takes = 10, status = 0, files = {} } = results[name] ?? {}
      seen.push({ command, seconds, cuda: env.REQUIRE_CUDA })
      for (const [file, content] of Object.entries(files))
        writeFileSync(
          join(out, file),
          typeof content === 'string' ? content : JSON.stringify(content),
        )
      clock += Math.min(takes, seconds)
      return { status: takes > seconds ? 1 : status, late: takes > seconds }
    },
  }
}

const passed = {
  numPassedTests: 7,
  numFailedTests: 0,
  numPendingTests: 1,
  testResults: [{ status: 'passed' }],
}
const healthy = {
  probe: { files: { 'probe.json': passed } },
  tests: { files: { 'tests.json': passed } },
  // Files that are there stand in for cases: their sizes are looked at.
  cases: {
    files: {
      'cases.log': ['README.md 1 2', 'package.json 0 1', 'tsconfig.json 0']
        .map((launches) => `case ${join(root, launches)}\n`)
        .join(''),
    },
  },
  bench: { files: { 'bench.json': { rows: [1, 2] } } },
  memcheck: {
    files: {
      'memcheck.log': 'case one 0 1\ncase two 2\n',
      'memcheck-1.txt': '========= ERROR SUMMARY: 0 errors\n',
    },
  },
  racecheck: {
    files: {
      'racecheck.log': 'case one 0 1\ncase two 2\n',
      'racecheck-1.txt': '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n',
    },
  },
  scaling: { files: { 'scaling.json': { rows: [1] } } },
}

async function check(results: Parameters<typeof pretended>[0], seconds = 570) {
  const runner = pretended(results)
  const lines: string[] = []
  const code = await gpuCheck({
    out,
    machine,
    seconds,
    run: runner.run,
    now: runner.now,
    print: (line: string) => void lines.push(line),
  })
  const summary = JSON.parse(readFileSync(join(out, 'summary.json'), 'utf8'))
  const states = Object.fromEntries(
    summary.steps.map(({ name, state }: { name: string; state: string }) => [name, state]),
  )
  return { code, states, summary, lines, seen: runner.seen }
}

test('all steps, each with REQUIRE_CUDA, and a table last', async () => {
  const { code, states, lines, seen, summary } = await check(healthy)
  expect(code).toBe(0)
  expect(Object.keys(states)).toEqual(Object.keys(healthy))
  expect(new Set(Object.values(states))).toEqual(new Set(['ok']))
  expect(seen.every(({ cuda }) => cuda === '1')).toBe(true)
  expect(summary.machine).toEqual(machine)
  expect(lines.slice(-9)).toEqual([
    'devices: cuda:0 a GPU (9.0)',
    'node: v0',
    expect.stringMatching(/^probe +ok +10 s {2}7 passed, 0 failed, 1 skipped$/),
    expect.stringMatching(/^tests +ok +10 s {2}7 passed/),
    expect.stringMatching(/^cases +ok +10 s {2}3 cases, 0 failed$/),
    expect.stringMatching(/^bench +ok +10 s {2}2 rows$/),
    expect.stringMatching(/^memcheck +ok +10 s {2}0 errors; 2 cases, 0 failed$/),
    expect.stringMatching(/^racecheck +ok/),
    expect.stringMatching(/^scaling +ok/),
  ])
})

test('a failed step fails the run, and the others still run', async () => {
  const failing = { ...passed, numFailedTests: 2, testResults: [{ status: 'failed' }] }
  const { code, states } = await check({
    ...healthy,
    tests: { status: 1, files: { 'tests.json': failing } },
    memcheck: { files: { 'memcheck-1.txt': '========= ERROR SUMMARY: 3 errors\n' } },
    probe: { status: 1 },
  })
  expect(code).toBe(1)
  expect(states).toMatchObject({ probe: 'FAILED', tests: 'FAILED', memcheck: 'FAILED' })
  expect(states).toMatchObject({ bench: 'ok', scaling: 'ok' })
})

test('time limit: measurements may be shortened, tests may not, further steps are not started', async () => {
  const long = await check({ ...healthy, bench: { ...healthy.bench, seconds: 10_000 } })
  expect(long.code).toBe(0)
  expect(long.states.bench).toBe('cut short')
  expect(long.summary.steps[3].words).toBe('2 rows; stopped after its time')

  const tests = await check({ ...healthy, tests: { ...healthy.tests, seconds: 10_000 } })
  expect([tests.code, tests.states.tests]).toEqual([1, 'FAILED'])

  // Each has what is kept for it and what the others left over, and all of it is less than ten minutes.
  const kept = plan(out).map(({ seconds }) => seconds)
  expect(kept.reduce((a, b) => a + b)).toBeLessThan(600)
  const limits = tests.seen.map(({ seconds }) => seconds)
  expect(limits.slice(0, 3)).toEqual([kept[0], kept[0]! - 10 + kept[1]!, kept[2]])
  expect(limits[3]).toBe(kept[2]! - 10 + kept[3]!)
  expect(limits[4]).toBe(limits[3]! - 10 + kept[4]!)

  const short = await check(healthy, 530)
  expect(new Set(Object.values(short.states))).toEqual(new Set(['ok']))
  const none = await check(healthy, 100)
  expect([none.code, none.states.probe, none.states.scaling]).toEqual([1, 'not reached', 'ok'])
})

test('a missing or broken tool is reported, without failing the run', async () => {
  const { code, states, summary } = await check({
    ...healthy,
    memcheck: { status: 127 },
    racecheck: {
      status: 1,
      files: { 'racecheck-9.txt': '========= Error: Device not supported\n' },
    },
  })
  expect(code).toBe(0)
  expect(states).toMatchObject({ memcheck: 'skipped', racecheck: 'skipped' })
  const [, , , , memcheck, racecheck] = summary.steps
  expect(memcheck.words).toBe('compute-sanitizer is not here')
  expect(racecheck.words).toBe('it does not work here: Error: Device not supported')
})

test('the sanitizers run the smallest cases that launch each kernel', async () => {
  const { seen } = await check(healthy)
  const [, , cases, , memcheck, racecheck] = seen.map(({ command }) => command)
  expect(cases!.slice(1)).toEqual(['--kernels', join(root, 'build/twin/cases')])
  for (const [tool, command] of Object.entries({ memcheck, racecheck })) {
    expect(command!.slice(0, 2)).toEqual(['compute-sanitizer', `--tool=${tool}`])
    const runner = command!.indexOf(cases![0]!)
    expect(command!.slice(runner + 1)).toEqual([
      '--kernels',
      ...['tsconfig.json', 'package.json', 'README.md'].map((name) => join(root, name)),
    ])
  }
})

test('a finding of a sanitizer or a case fails its step', () => {
  writeFileSync(join(out, 'memcheck.log'), 'case one 0\ncase two 1\nFAIL two: [3] of 4 is 1\n')
  for (const [i, errors] of [2, 0, 1].entries())
    writeFileSync(join(out, `memcheck-${i}.txt`), `========= ERROR SUMMARY: ${errors} errors\n`)
  expect(sanitizerWords(out, 'memcheck')).toEqual({
    words: '3 errors; 2 cases, 1 failed',
    failed: 4,
  })
  // A process that was stopped has no summary.
  writeFileSync(join(out, 'memcheck-9.txt'), '=== COMPUTE-SANITIZER\n=== Invalid __global__ read\n')
  expect(sanitizerWords(out, 'memcheck')).toMatchObject({ failed: 5 })
  expect(sanitizerWords(out, 'racecheck')).toMatchObject({ skipped: true })
  writeFileSync(join(out, 'racecheck-1.txt'), '=== RACECHECK SUMMARY: 0 hazards displayed\n')
  expect(sanitizerWords(out, 'racecheck')).toEqual({
    words: '0 errors; 0 cases, 0 failed',
    failed: 1,
  })
})

test('the steps use what is built: no network, no build', async () => {
  const { seen } = await check(healthy)
  for (const { command } of seen) expect(command.join(' ')).not.toMatch(/\b(npm|npx|build\.mjs)\b/)
})

test('tests of the packaging are left out where their tools are missing', () => {
  const [, tests] = plan(out, [['test/pack.test.ts', 'npm']])
  expect(tests!.command).toContain('--exclude=test/pack.test.ts')
  writeFileSync(join(out, 'tests.json'), JSON.stringify(passed))
  expect(tests!.judge()).toEqual({
    words: '7 passed, 0 failed, 1 skipped; left out: test/pack.test.ts, which needs npm',
    failed: 0,
  })
})

test('a command that times out is killed with its children; a missing one is 127', async () => {
  const log = join(out, 'log')
  const child = `require('node:child_process').spawn('sleep',['30'],{stdio:'inherit'});console.log('began')`
  const start = performance.now()
  const late = await runCommand([process.execPath, '-e', child], {
    log,
    seconds: 1,
    env: process.env,
  })
  expect(late.late).toBe(true)
  expect(performance.now() - start).toBeLessThan(20_000)
  expect(readFileSync(log, 'utf8')).toBe('began\n')
  expect(await runCommand(['no-such-tool'], { log, seconds: 5, env: process.env })).toEqual({
    status: 127,
    late: false,
  })
})
