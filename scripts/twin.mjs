// Builds the kernel twin (test/twin) and runs its programs, then the cases that the operations' tests
// recorded. Under a sanitizer, the last of `npm run test:asan` and `npm run test:tsan`.
//
//   node scripts/twin.mjs plain|asan|tsan [--quick]
//
// --quick leaves out the units and mutants and runs one schedule over the cases.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const cases = join(root, 'build/twin/cases')

/** Why the twin cannot run here, or nothing. */
export function twinProblem() {
  if (process.platform !== 'linux' || process.arch !== 'x64') return 'it runs on x86-64 Linux'
  if (spawnSync('cmake', ['--version']).status !== 0) return 'it needs CMake'
  if (!cudaInclude()) return "it needs the CUDA toolkit's headers"
  return undefined
}

function cudaInclude() {
  const nvcc = spawnSync('sh', ['-c', 'readlink -f "$(command -v nvcc)"'], { encoding: 'utf8' })
  const beside = nvcc.stdout.trim() && join(dirname(nvcc.stdout.trim()), '../include')
  const places = [
    process.env.CUDA_HOME && join(process.env.CUDA_HOME, 'include'),
    beside,
    '/usr/local/cuda/include',
  ]
  return places.find((p) => p && existsSync(join(p, 'cuda_bf16.h')))
}

function step(command, args, quiet) {
  const { status, stdout, error } = spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    stdio: quiet ? ['ignore', 'pipe', 'pipe'] : 'inherit',
    maxBuffer: 1 << 28,
  })
  if (error) throw error
  return { ok: status === 0, output: stdout ?? '' }
}

/** Builds a variant; throws with the compiler's words. */
export function buildTwin(variant, targets) {
  const folder = join(root, 'build/twin', variant)
  const configure = step(
    'cmake',
    [
      '-S',
      'test/twin',
      '-B',
      folder,
      `-DTWIN_VARIANT=${variant}`,
      `-DCUDA_INCLUDE=${cudaInclude()}`,
    ],
    true,
  )
  if (!configure.ok) throw new Error(`the twin could not be configured:\n${configure.output}`)
  const jobs = String(availableParallelism())
  const build = step('cmake', ['--build', folder, '-j', jobs, '--target', ...targets], true)
  if (!build.ok) throw new Error(`the twin could not be built:\n${build.output.slice(-8000)}`)
}

const all = ['units', 'mutants', 'probe', 'runner']

/** The runs of a variant: a title, and a function that gives { ok, output }. */
export function twinRuns(variant, { quick = false, seed = Date.now() % 1_000_000 } = {}) {
  const program = (name, ...args) => step(join(root, 'build/twin', variant, name), args, true)
  const schedules = [
    ['fifo', 'late'],
    ['lifo', 'early'],
    ['warp', 'random'],
  ]
  const runs = []
  if (!quick) {
    runs.push({ title: 'the runtime keeps the rules of the machine', run: () => program('units') })
    runs.push({ title: 'planted bugs are caught', run: () => program('mutants') })
  }
  runs.push({
    title: 'the primitives give the golden values',
    run: () =>
      step(
        'cmake',
        [
          `-DPROBE=${join('build/twin', variant, 'probe')}`,
          '-DGOLDEN=test/twin/probe.golden',
          '-P',
          'test/twin/probe.cmake',
        ],
        true,
      ),
  })
  for (const [order, async] of quick ? schedules.slice(2) : schedules) {
    const options = ['--order', order, '--async', async, '--seed', String(seed)]
    runs.push({
      title: `recorded cases, ${options.join(' ')}`,
      run: () =>
        existsSync(cases)
          ? program('runner', ...options, cases)
          : { ok: false, output: 'no cases were recorded: run the tests first' },
    })
  }
  return runs
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [variant, ...flags] = process.argv.slice(2)
  if (!['plain', 'asan', 'tsan'].includes(variant) || flags.some((f) => f !== '--quick')) {
    console.error('usage: node scripts/twin.mjs plain|asan|tsan [--quick]')
    process.exit(2)
  }
  const problem = twinProblem()
  if (problem) {
    console.log(`The kernel twin is skipped: ${problem}.`)
    process.exit(0)
  }
  console.log(
    `Building the kernel twin, ${variant}, in ${relative(process.cwd(), join(root, 'build/twin', variant))} ...`,
  )
  buildTwin(variant, all)
  let failed = 0
  const runs = twinRuns(variant, { quick: flags.includes('--quick') })
  for (const { title, run } of runs) {
    const start = performance.now()
    const { ok, output } = run()
    console.log(
      `${ok ? 'ok  ' : 'FAIL'} ${title}: ${output.trim().split('\n').at(-1)} (${((performance.now() - start) / 1000).toFixed(1)} s)`,
    )
    if (!ok) console.log(output.slice(-6000))
    failed += ok ? 0 : 1
  }
  console.log(`${runs.length - failed} passed, ${failed} failed`)
  process.exit(failed ? 1 : 0)
}
