// Builds the kernel twin (test/twin) and runs its programs, then the cases that the operations' tests
// recorded. Under a sanitizer, the last of `npm run test:asan` and `npm run test:tsan`.
//
//   node scripts/twin.mjs plain|asan|tsan [--quick]
//
// --quick skips units and mutants and runs one schedule over the smallest cases that together launch
// every kernel.
import { execFile, spawnSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { availableParallelism } from 'node:os'
import { basename, dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { planted, plantedLayouts } from '../test/twin/planted.mjs'
import { unpackGolden } from './unpack-golden.mjs'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
export const cases = join(root, 'build/twin/cases')
const jobs = String(availableParallelism())
const folderOf = (variant) => join(root, 'build/twin', variant)

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

function step(command, args) {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'pipe'],
    maxBuffer: 1 << 28,
  })
  if (error) throw error
  // The last line of stdout is a program's summary, so it stays last.
  return { ok: status === 0, output: stdout, errors: stderr }
}

/** Builds a variant; throws with the compiler's output. */
export function buildTwin(variant, targets = ['units', 'mutants', 'probe', 'hopper', 'runner']) {
  const folder = folderOf(variant)
  const configure = step('cmake', [
    '-S',
    'test/twin',
    '-B',
    folder,
    `-DTWIN_VARIANT=${variant}`,
    `-DCUDA_INCLUDE=${cudaInclude()}`,
  ])
  if (!configure.ok)
    throw new Error(`the twin could not be configured:\n${configure.output}${configure.errors}`)
  const build = step('cmake', ['--build', folder, '-j', jobs, '--target', ...targets])
  if (!build.ok)
    throw new Error(`the twin could not be built:\n${(build.output + build.errors).slice(-8000)}`)
}

const schedules = [
  ['fifo', 'late'],
  ['lifo', 'early'],
  ['warp', 'random'],
]
const options = ([order, async], seed) => ['--order', order, '--async', async, '--seed', `${seed}`]

// ---- The kernels, and which of them the cases launch ----

/** The names of cuda/'s __global__ functions. */
function kernelNames() {
  const folder = join(root, 'cuda')
  const names = new Set()
  for (const file of readdirSync(folder, { recursive: true }))
    if (/\.cuh?$/.test(file)) {
      const declared = readFileSync(join(folder, file), 'utf8').matchAll(
        /__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(/g,
      )
      for (const [, name] of declared) names.add(name)
    }
  return names
}

/** The kernels, instantiated, in a program or library: [address, name without parameters]. */
export function kernelsIn(file) {
  const names = kernelNames()
  const { ok, output, errors } = step('nm', ['-C', file])
  if (!ok) throw new Error(`nm: ${errors}`)
  const kernels = []
  for (const line of output.split('\n')) {
    const [, address, symbol] = line.match(/^([0-9a-f]+) [tTwW] (.*)$/) ?? []
    if (!symbol || /\[clone|\.cold|::\{lambda/.test(symbol)) continue
    const [, path] =
      symbol.match(/^(?:void )?(p2r::cuda::(?:\w+::|\(anonymous namespace\)::)*\w+)/) ?? []
    if (!path || !names.has(path.split('::').at(-1))) continue
    kernels.push([
      Number.parseInt(address, 16),
      withoutParameters(symbol.replace(/^void /, ''), path),
    ])
  }
  return kernels
}

// The qualified name with its template arguments.
function withoutParameters(symbol, path) {
  let depth = 0
  let end = path.length
  if (symbol[end] === '<')
    do {
      depth += symbol[end] === '<' ? 1 : symbol[end] === '>' ? -1 : 0
      end++
    } while (depth)
  return symbol.slice(0, end)
}

/** The cases, smallest first, with the kernels that each launched, from a runner's `--kernels` output. */
function launchesIn(output) {
  return [...output.matchAll(/^case (\S+)(.*)$/gm)]
    .map(([, path, kernels]) => ({
      path,
      bytes: statSync(path).size,
      kernels: kernels.split(' ').filter(Boolean).map(Number),
    }))
    .sort((a, b) => a.bytes - b.bytes || (a.path < b.path ? -1 : 1))
}

/** The plain runner's `--kernels` output for all cases; kernels are offsets in the runner. */
const launches = () => {
  launched ??= step(join(folderOf('plain'), 'runner'), ['--jobs', jobs, '--kernels', cases]).output
  return launched
}
let launched

/** The kernels of the twin that no recorded case launches. */
export function kernelsNotLaunched() {
  const runner = join(folderOf('plain'), 'runner')
  const origin = Number.parseInt(
    step('nm', [runner]).output.match(/^([0-9a-f]+) T runner_origin$/m)[1],
    16,
  )
  const launched = new Set(
    launchesIn(launches()).flatMap((c) => c.kernels.map((offset) => offset + origin)),
  )
  const all = kernelsIn(runner)
  return { all: all.length, missing: all.filter(([a]) => !launched.has(a)).map(([, name]) => name) }
}

/**
 * The smallest cases that together launch every kernel and call every operation, from a runner's `--kernels`
 * output.
 */
export function covering(output) {
  const covered = new Set()
  return launchesIn(output)
    .filter(({ path, kernels }) => {
      const operation = path.match(/-(\w+)\.case$/)?.[1]
      const fresh = [`operation ${operation}`, ...kernels].filter((k) => !covered.has(k))
      for (const k of fresh) covered.add(k)
      return fresh.length > 0
    })
    .map(({ path }) => path)
}

// ---- Bugs planted in the library's kernels ----

// Compiles the changed file with the original's command. The linker takes it instead of the program's
// own object if it is one of these, and else before the libraries.
async function buildPlanted(variant, name, bug, program) {
  const { file, compile = file, search, replace } = bug
  const folder = join(folderOf(variant), 'planted', name)
  // Files of an earlier bug would be included instead of the library's own.
  rmSync(folder, { recursive: true, force: true })
  for (const path of new Set([file, compile].map(dirname)))
    mkdirSync(join(folder, path), { recursive: true })
  const source = readFileSync(join(root, file), 'utf8')
  if (source.split(search).length !== 2)
    throw new Error(`${file} has changed: this bug can no longer be planted there`)
  if (compile !== file)
    writeFileSync(join(folder, compile), readFileSync(join(root, compile), 'utf8'))
  writeFileSync(
    join(folder, file),
    source.replace(search, () => replace),
  )
  const commands = JSON.parse(
    readFileSync(join(folderOf(variant), 'compile_commands.json'), 'utf8'),
  )
  const { command } = commands.find((c) => c.file === join(root, compile))
  const [compiler, ...flags] = command.split(' ').filter(Boolean)
  const object = join(folder, 'changed.o')
  flags[flags.indexOf('-o') + 1] = object
  flags[flags.indexOf('-c') + 1] = join(folder, compile)
  const linked = join(folder, program)
  const at = (name) => join(folderOf(variant), name)
  const objects = commands
    .filter(
      (c) => c.command.includes(` CMakeFiles/${program}.dir/`) && c.file !== join(root, compile),
    )
    .map((c) => at(c.command.match(/ -o (\S+)/)[1]))
  const sanitizers = flags.filter((f) => /^-fsanitize=(address|thread)/.test(f))
  for (const args of [
    [`-I${folder}`, ...flags],
    [
      ...sanitizers,
      object,
      ...objects,
      at('libtwin_kernels.a'),
      at('libtwin_runtime.a'),
      '-pthread',
      '-o',
      linked,
    ],
  ]) {
    await compiled(compiler, args)
  }
  return linked
}

// Asynchronous, since bugs are compiled one by one beside other work of this process.
function compiled(compiler, args) {
  return new Promise((resolve, reject) => {
    execFile(compiler, args, { cwd: root, maxBuffer: 1 << 28 }, (error, _, errors) => {
      if (error) reject(new Error(errors.slice(-8000) || error.message))
      else resolve()
    })
  })
}

async function tryPlanted(variant, index) {
  const { cases: wanted } = planted[index]
  const folders = existsSync(cases) ? readdirSync(cases).filter((f) => wanted.test(f)) : []
  if (!folders.length) return { ok: false, output: 'no cases were recorded: run the tests first' }
  const runner = await buildPlanted(variant, `case-${index}`, planted[index], 'runner')
  const paths = folders.map((f) => join(cases, f))
  for (const schedule of schedules) {
    const { ok, output, errors } = step(runner, [...options(schedule, 1), '--jobs', jobs, ...paths])
    if (ok) continue
    const report = errors.match(/(?:WARNING|ERROR): \w+Sanitizer: [^(\n]*/)?.[0]
    const first = output.match(/^FAIL \S+: (.*)$/m)?.[1]
    return { ok: true, output: `${schedule.join(', ')}: ${report?.trim() ?? first}` }
  }
  return { ok: false, output: 'no schedule noticed it' }
}

// ---- NVIDIA's own answers ----

/** Compares layouts with the tables of test/golden/hopper.br. */
export function compareWithTables(program) {
  const folder = join(root, 'build/twin/hopper')
  const { index, bytes } = unpackGolden('hopper')
  mkdirSync(folder, { recursive: true })
  for (const path of Object.keys(index)) writeFileSync(join(folder, basename(path)), bytes(path))
  return step(program, [folder])
}

/**
 * Of the shared-memory operands that the recorded cases' kernels pass to wgmma: `unknown`, those that are
 * no tile of CuTe's, and `unused`, the kernels' tiles by the tables that no case passes.
 */
export function operandsWithoutForm() {
  const { forms, products } = JSON.parse(unpackGolden('hopper').bytes('hopper/descriptors.json'))
  const taken = [...new Set(launches().match(/^operand .*$/gm))].map((line) => {
    const [, operand, major, ...numbers] = line.split(' ')
    return { line, operand, major, numbers: numbers.map(Number) }
  })
  const isTakenAs = (form) => (operand) => {
    const [swizzle, leading, stride, rows] = operand.numbers
    return (
      operand.operand === form.operand &&
      operand.major === form.major &&
      swizzle === form.swizzle &&
      (leading === form.lbo || !form.lbo_matters) &&
      stride === form.sbo &&
      rows === form.instruction_mn
    )
  }
  // Tiles without a TMA box are no kernel's.
  const stored = forms.filter((form) => form.tma_box.length > 0)
  const known = new Set(products.flatMap(({ a, b }) => [a, b]).filter((id) => id !== 'registers'))
  return {
    unknown: taken
      .filter((operand) => !stored.some((form) => isTakenAs(form)(operand)))
      .map(({ line }) => line),
    unused: stored
      .filter((form) => known.has(form.id) && !taken.some(isTakenAs(form)))
      .map(({ id }) => id),
  }
}

async function tryPlantedLayout(variant, index) {
  const bug = plantedLayouts[index]
  const { ok, output, errors } = compareWithTables(
    await buildPlanted(variant, `layout-${index}`, bug, 'hopper'),
  )
  if (ok) return { ok: false, output: 'no comparison failed' }
  const first = output.match(/^FAIL (.*)$/m)?.[1]
  return first ? { ok: true, output: first } : { ok: false, output: errors || output }
}

// ---- All runs ----

/** The runs of a variant: a title, and a function that returns { ok, output }, a promise for planted bugs. */
export function twinRuns(variant, { quick = false, seed = Date.now() % 1_000_000 } = {}) {
  const program = (name, ...args) => {
    const { ok, output, errors } = step(join(folderOf(variant), name), args)
    return { ok, output: ok ? output : `${errors.slice(0, 12_000)}\n${output}` }
  }
  const runs = []
  if (!quick) {
    runs.push({ title: 'the runtime keeps the rules of the machine', run: () => program('units') })
    runs.push({ title: 'planted bugs are caught', run: () => program('mutants') })
  }
  runs.push({
    title: 'the primitives give the golden values',
    run: () =>
      step('cmake', [
        `-DPROBE=${join('build/twin', variant, 'probe')}`,
        '-DGOLDEN=test/twin/probe.golden',
        '-P',
        'test/twin/probe.cmake',
      ]),
  })
  if (variant === 'plain') {
    runs.push({
      title: "layouts are those of NVIDIA's CuTe",
      run: () => compareWithTables(join(folderOf(variant), 'hopper')),
    })
    for (const [index, { bug }] of plantedLayouts.entries())
      runs.push({
        title: `caught by the tables: ${bug}`,
        run: () => tryPlantedLayout(variant, index),
        planted: true,
      })
  }
  const last = schedules.at(-1)
  for (const schedule of quick ? [last] : schedules) {
    const given = options(schedule, seed)
    // Which addresses are touched hardly depends on the order: ASan, which takes minutes a schedule, sees all cases in one.
    const few = quick || (variant === 'asan' && schedule !== last)
    runs.push({
      title: `recorded cases${few ? ' of each kernel' : ''}, ${given.join(' ')}`,
      run: () => {
        if (!existsSync(cases))
          return { ok: false, output: 'no cases were recorded: run the tests first' }
        return program(
          'runner',
          ...given,
          '--jobs',
          jobs,
          ...(few ? covering(launches()) : [cases]),
        )
      },
    })
  }
  if (!quick)
    runs.push({
      title: 'recorded cases of each kernel, with inputs that begin at any element',
      run: () => program('runner', '--shift', '--jobs', jobs, ...covering(launches())),
    })
  for (const [index, { bug, variant: home }] of planted.entries())
    if (home === variant)
      runs.push({ title: `caught: ${bug}`, run: () => tryPlanted(variant, index), planted: true })
  return runs
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [variant, ...flags] = process.argv.slice(2)
  if (!['plain', 'asan', 'tsan'].includes(variant) || flags.some((f) => f !== '--quick')) {
    console.error('usage: node scripts/twin.mjs plain|asan|tsan [--quick]')
    process.exit(2)
  }
  const quick = flags.includes('--quick')
  const problem = twinProblem()
  if (problem) {
    console.log(`The kernel twin is skipped: ${problem}.`)
    process.exit(0)
  }
  const timed = async (title, work) => {
    const start = performance.now()
    const { ok, output } = await work()
    const took = ((performance.now() - start) / 1000).toFixed(1)
    console.log(`${ok ? 'ok  ' : 'FAIL'} ${title}: ${output.trim().split('\n').at(-1)} (${took} s)`)
    if (!ok) console.log(output.slice(-12_000))
    return ok
  }
  console.log(
    `Building the kernel twin, ${variant}, in ${relative(process.cwd(), folderOf(variant))} ...`,
  )
  const start = performance.now()
  buildTwin(variant, quick ? ['probe', 'runner'] : undefined)
  // The plain build's runner tells which cases launch which kernel.
  if (quick) buildTwin('plain', ['runner'])
  console.log(`built (${((performance.now() - start) / 1000).toFixed(1)} s)`)
  const runs = twinRuns(variant, { quick })
  let failed = 0
  for (const { title, run } of runs) if (!(await timed(title, run))) failed++
  console.log(`${runs.length - failed} passed, ${failed} failed`)
  process.exit(failed ? 1 : 0)
}
