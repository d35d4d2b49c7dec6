// Proves and times everything on a machine with a GPU, within ten minutes: the probe of the kernel
// twin, all tests with REQUIRE_CUDA=1, the cases that they recorded for the twin, the benchmarks
// beside PyTorch, compute-sanitizer over one small case of each kernel, and growth with size. Uses
// what is built (build/Release/, build/*.stamp, dist/, node_modules/), asks nothing of the network,
// saves what it has after each step, and prints a short table last.
//
//   node scripts/gpu_check.mjs [--out DIR]      (out/gpu unless given)
import { spawn, spawnSync } from 'node:child_process'
import {
  createWriteStream,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { covering } from './twin.mjs'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const totalSeconds = 570

/** Tests of the package's making, where what they use was not brought along. */
function withoutTools() {
  const require = createRequire(import.meta.url)
  const resolves = (name) => {
    try {
      return Boolean(require.resolve(name))
    } catch {
      return false
    }
  }
  return [
    ...(spawnSync('npm', ['--version']).status === 0 ? [] : [['test/pack.test.ts', 'npm']]),
    ...(resolves('typescript/package.json') ? [] : [['test/consumer.test.ts', 'typescript']]),
  ]
}

const vitest = (out, name, ...args) => [
  process.execPath,
  'node_modules/vitest/vitest.mjs',
  'run',
  '--project=package',
  '--reporter=default',
  '--reporter=json',
  `--outputFile.json=${join(out, `${name}.json`)}`,
  ...args,
]

/** What a vitest run came to, from its JSON. */
function tested(out, name) {
  const file = join(out, `${name}.json`)
  if (!existsSync(file)) return { words: 'no result was written', failed: 1 }
  const {
    numPassedTests: passed,
    numFailedTests: failed,
    numPendingTests: skipped,
    testResults,
  } = JSON.parse(readFileSync(file, 'utf8'))
  const broken = testResults.filter((t) => t.status === 'failed').length
  return {
    words: `${passed} passed, ${failed} failed, ${skipped} skipped`,
    failed: failed || broken || (passed === 0 ? 1 : 0),
  }
}

function measured(out, name) {
  const file = join(out, `${name}.json`)
  if (!existsSync(file)) return { words: 'nothing was measured', failed: 1 }
  const { rows } = JSON.parse(readFileSync(file, 'utf8'))
  return { words: `${rows.length} rows`, failed: rows.length ? 0 : 1 }
}

/**
 * The steps in order: a command, the seconds kept for it, and what its files say after it. What a step leaves
 * of its time goes to those after it; one that may be cut keeps what it has by then.
 */
export function plan(out, lacking = withoutTools()) {
  const left = lacking.map(([file, tool]) => `; left out: ${file}, which needs ${tool}`).join('')
  const bench = (name, ...args) => [
    process.execPath,
    'dist/bench/main.js',
    ...args,
    '--device=cuda',
    '--quick',
    `--json=${join(out, `${name}.json`)}`,
  ]
  const runner = join(root, 'build/Release/device_runner')
  const sanitized = (tool) => ({
    name: tool,
    seconds: 50,
    cut: true,
    command: () => [
      'compute-sanitizer',
      `--tool=${tool}`,
      '--target-processes=all',
      `--log-file=${join(out, `${tool}-%p.txt`)}`,
      runner,
      '--kernels',
      ...covering(logged(out, 'cases')),
    ],
    judge: () => sanitizerWords(out, tool),
  })
  return [
    {
      name: 'probe',
      seconds: 60,
      command: vitest(out, 'probe', 'test/probe.test.ts'),
      judge: () => tested(out, 'probe'),
    },
    {
      name: 'tests',
      seconds: 180,
      command: vitest(
        out,
        'tests',
        '--maxWorkers=8',
        ...['test/probe.test.ts', ...lacking.map(([file]) => file)].map((f) => `--exclude=${f}`),
      ),
      judge: () => {
        const { words, failed } = tested(out, 'tests')
        return { words: words + left, failed }
      },
    },
    {
      name: 'cases',
      seconds: 30,
      command: [runner, '--kernels', join(root, 'build/twin/cases')],
      judge: () => replayed(out, 'cases'),
    },
    {
      name: 'bench',
      seconds: 160,
      cut: true,
      // What was predicted comes first, then everything else.
      command: bench('bench', 'attention', 'logprob', 'evidence', 'all'),
      judge: () => measured(out, 'bench'),
    },
    sanitized('memcheck'),
    sanitized('racecheck'),
    {
      name: 'scaling',
      seconds: 40,
      cut: true,
      command: bench('scaling', '--scaling', '--no-peers'),
      judge: () => measured(out, 'scaling'),
    },
  ]
}

const logged = (out, name) => {
  const file = join(out, `${name}.log`)
  return existsSync(file) ? readFileSync(file, 'utf8') : ''
}

/** What came of the recorded cases, or of those until the time was up. */
function replayed(out, name) {
  const count = (pattern) => logged(out, name).match(pattern)?.length ?? 0
  const [ran, failed] = [count(/^case /gm), count(/^FAIL /gm)]
  return { words: `${ran} cases, ${failed} failed`, failed: ran ? failed : 1 }
}

/** What the tool's logs say: errors found, or why it does not work here. */
export function sanitizerWords(out, tool) {
  const logs = readdirSync(out)
    .filter((name) => name.startsWith(`${tool}-`) && name.endsWith('.txt'))
    .map((name) => readFileSync(join(out, name), 'utf8'))
  const unusable = logs
    .join('\n')
    .match(/^.*(not supported|Unable to|initialization failed|Internal Sanitizer).*$/im)
  if (unusable) return { skipped: true, words: `it does not work here: ${plain(unusable[0])}` }
  if (!logs.length) return { skipped: true, words: 'it wrote nothing' }
  let found = 0
  for (const log of logs) {
    const [, sum] = log.match(/(?:ERROR|RACECHECK) SUMMARY: (\d+)/) ?? []
    // A process that was stopped has no summary, but what was found until then.
    found += sum ? Number(sum) : (log.match(/^=+ (?:Invalid|Error: |Program hit)/gm) ?? []).length
  }
  const { words, failed } = replayed(out, tool)
  return { words: `${found} errors; ${words}`, failed: found + failed }
}

const plain = (line) => line.replace(/^=+\s*/, '').trim()

/**
 * Runs a command in the background of its own process group, its output in a file; the whole group is ended
 * when its time is up.
 */
export function runCommand([command, ...args], { log, seconds, env }) {
  return new Promise((resolve) => {
    const file = createWriteStream(log)
    const child = spawn(command, args, { cwd: root, env, detached: true })
    child.stdout.pipe(file, { end: false })
    child.stderr.pipe(file, { end: false })
    let late = false
    const timer = setTimeout(() => {
      late = true
      process.kill(-child.pid, 'SIGKILL')
    }, seconds * 1000)
    const end = (status) => {
      clearTimeout(timer)
      file.end(() => resolve({ status, late }))
    }
    child.on('error', (error) => {
      file.write(`${error.message}\n`)
      end(127)
    })
    child.on('close', (status) => end(status ?? 1))
  })
}

/**
 * All steps within the seconds, each saved as it ends. Returns 0 when all that could run succeeded.
 */
export async function gpuCheck({
  out,
  machine,
  steps = plan(out),
  run = runCommand,
  seconds = totalSeconds,
  now = () => performance.now() / 1000,
  print = console.log,
}) {
  mkdirSync(out, { recursive: true })
  const start = now()
  const summary = { date: new Date().toISOString(), machine, steps: [] }
  const save = () =>
    writeFileSync(join(out, 'summary.json'), `${JSON.stringify(summary, undefined, 2)}\n`)
  save()
  for (const [at, { name, command, cut = false, judge }] of steps.entries()) {
    const began = now()
    const kept = steps.slice(at + 1).reduce((sum, later) => sum + later.seconds, 0)
    const left = seconds - (began - start) - kept
    let step
    if (left < 5) step = { state: 'not reached', words: 'the time was up' }
    else {
      print(`${name} ...`)
      const given = typeof command === 'function' ? command() : command
      const { status, late } = await run(given, {
        log: join(out, `${name}.log`),
        seconds: left,
        env: { ...process.env, REQUIRE_CUDA: '1' },
      })
      const { words, failed, skipped } =
        status === 127 ? { skipped: true, words: `${given[0]} is not here` } : judge()
      const state = skipped
        ? 'skipped'
        : failed || (late && !cut)
          ? 'FAILED'
          : late
            ? 'cut short'
            : status !== 0 && !cut
              ? 'FAILED'
              : 'ok'
      step = { state, words: late ? `${words}; stopped after its time` : words, status }
    }
    summary.steps.push({ name, ...step, seconds: now() - began })
    save()
  }
  const width = Math.max(...summary.steps.map(({ name }) => name.length))
  print('')
  for (const [what, version] of Object.entries(machine)) print(`${what}: ${version}`)
  for (const { name, state, words, seconds } of summary.steps)
    print(
      `${name.padEnd(width)}  ${state.padEnd(11)}  ${seconds.toFixed(0).padStart(4)} s  ${words}`,
    )
  return summary.steps.some(({ state }) => state === 'FAILED' || state === 'not reached') ? 1 : 0
}

/** The GPUs and the versions of what is used with them. */
function describeMachine(devices) {
  const first = (command, ...args) =>
    spawnSync(command, args, { encoding: 'utf8' }).stdout?.trim().split('\n').at(-1) || 'not here'
  const gpu = '--query-gpu=name,driver_version,memory.total,clocks.max.sm'
  return {
    devices: devices
      .map(({ id, name, computeCapability: cc }) => `${id} ${name} (${cc})`)
      .join(', '),
    driver: first('nvidia-smi', gpu, '--format=csv,noheader'),
    node: process.version,
    nvcc: first('nvcc', '--version'),
    'compute-sanitizer': first('compute-sanitizer', '--version'),
    PyTorch: first(
      process.env.PYTHON ?? 'python3',
      '-c',
      'import torch; print(torch.__version__, torch.version.cuda)',
    ),
  }
}

async function main(args) {
  const at = args.indexOf('--out')
  if (args.length && (at !== 0 || args.length !== 2)) {
    console.error('usage: node scripts/gpu_check.mjs [--out DIR]')
    return 2
  }
  const library = join(root, 'dist/lib/index.js')
  if (!existsSync(library)) {
    console.error(
      'gpu:check uses what is built: run `npm run compile` first, and bring build/Release/, build/*.stamp and dist/.',
    )
    return 1
  }
  const { cudaStatus, devices } = await import(pathToFileURL(library).href)
  const status = cudaStatus()
  if (!status.available) {
    console.error(`gpu:check needs a GPU: ${status.reason}`)
    return 1
  }
  const gpus = devices().filter(({ backend }) => backend === 'cuda')
  const out = join(process.cwd(), at === 0 ? args[1] : 'out/gpu')
  const code = await gpuCheck({ out, machine: describeMachine(gpus) })
  const report = ['bench', 'scaling'].filter((name) => existsSync(join(out, `${name}.json`)))
  for (const name of report)
    spawnSync(
      process.execPath,
      [
        'dist/bench/main.js',
        '--input',
        join(out, `${name}.json`),
        '--html',
        join(out, `${name}.html`),
      ],
      { cwd: root },
    )
  return code
}

if (process.argv[1] === fileURLToPath(import.meta.url))
  process.exit(await main(process.argv.slice(2)))
