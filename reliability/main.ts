/**
 * `npm run reliability`: hostile calls, broken files, interrupted writes, failed allocations, terminated workers, leaks
 * and delays, in figures. docs/reliability.md is made from the results.
 */
import { execFileSync, spawnSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { availableParallelism, cpus, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { SingleBar } from 'cli-progress'
import { Command, InvalidArgumentError, Option } from 'commander'
import { allocationFailures } from './allocations.js'
import { eventLoopDelays } from './event_loop.js'
import { mutateFiles } from './files.js'
import { batchSize, type FuzzOutcome } from './fuzz.js'
import { runModule } from './processes.js'
import { pageOf, type Results } from './report.js'
import { soak, soaked } from './soak.js'
import { textGrowth } from './text.js'
import { terminateWorkers } from './workers.js'
import { interruptWriters } from './writers.js'

const root = fileURLToPath(new URL('../../', import.meta.url))
const parts = [
  'fuzz',
  'native',
  'files',
  'text',
  'writers',
  'allocations',
  'workers',
  'slopes',
  'soak',
  'delays',
] as const
type Part = (typeof parts)[number]

/** How much of each part is run. */
const amounts = {
  full: {
    calls: 200_000,
    inputs: 2_000_000,
    queueRounds: 3000,
    mutations: 20_000,
    letters: 100_000,
    kills: 20,
    stride: 1,
    terminations: 2000,
    rounds: 20_000,
    seconds: 3600,
    scale: 1,
  },
  quick: {
    calls: 5000,
    inputs: 20_000,
    queueRounds: 200,
    mutations: 600,
    letters: 20_000,
    kills: 2,
    stride: 7,
    terminations: 40,
    rounds: 400,
    seconds: 10,
    scale: 0.05,
  },
} // prettier-ignore

interface Options {
  quick?: boolean
  seed: number
  calls?: number
  seconds?: number
  sanitize?: boolean
  json?: string
  page?: boolean
}

const whole = (text: string): number => {
  if (/^\d+$/.test(text)) return Number(text)
  throw new InvalidArgumentError('It should be a whole number.')
}

/** A bar on a terminal, else nothing until the part's line. */
function progress(
  title: string,
  total: number,
): { at(done: number, what?: string): void; stop(): void } {
  const bar = new SingleBar({
    format: `${title.padEnd(8)} {bar} {percentage}% {what}`,
    barsize: 24,
    hideCursor: true,
  })
  bar.start(total, 0, { what: '' })
  return {
    at: (done, what = '') => bar.update(Math.min(done, total), { what }),
    stop: () => bar.stop(),
  }
}

/** Runs batches of hostile calls in processes, as many at once as there are cores. */
async function fuzzAll(
  calls: number,
  seed: number,
  sanitized: string | undefined,
): Promise<FuzzOutcome> {
  const batches = Math.ceil(calls / batchSize)
  const folder = mkdtempSync(join(tmpdir(), 'p2r-fuzz-'))
  const outcome: FuzzOutcome = { calls: 0, returned: 0, refused: 0, byName: {}, faults: [] }
  const bar = progress(sanitized ? 'sanitized' : 'fuzz', calls)
  const env = sanitized
    ? {
        P2R_ADDON: sanitized,
        LD_PRELOAD: execFileSync('g++', ['-print-file-name=libasan.so'], {
          encoding: 'utf8',
        }).trim(),
        // Node never frees all that it has at its end.
        ASAN_OPTIONS: 'detect_leaks=0:allocator_may_return_null=1',
        UBSAN_OPTIONS: 'print_stacktrace=1:halt_on_error=1',
      }
    : {}
  let next = 0
  const lane = async (): Promise<void> => {
    while (next < batches) {
      const first = next
      const last = Math.min(batches, first + 10)
      next = last
      const log = join(folder, `log-${first}`)
      writeFileSync(log, '')
      const args = [seed, first, last, join(folder, String(first)), log]
      // The sanitizers' own shadow memory counts.
      const ended = await runModule('fuzz', args, {
        env,
        log,
        cwd: folder,
        ...(!sanitized && { memory: 4 << 20 }),
      })
      if (ended.failure !== undefined) {
        outcome.faults.push(`the process ended: ${ended.failure}`)
        outcome.calls += (last - first) * batchSize
      } else {
        const made = JSON.parse(ended.out) as FuzzOutcome
        for (const key of ['calls', 'returned', 'refused'] as const) outcome[key] += made[key]
        for (const [name, count] of Object.entries(made.byName))
          outcome.byName[name] = (outcome.byName[name] ?? 0) + count
        outcome.faults.push(...made.faults)
      }
      bar.at(outcome.calls, `${outcome.faults.length} faults`)
    }
  }
  await Promise.all(Array.from({ length: availableParallelism() }, lane))
  bar.stop()
  rmSync(folder, { recursive: true, force: true })
  return outcome
}

/** The addon without CUDA under AddressSanitizer and UndefinedBehaviorSanitizer; its path. */
function buildSanitized(): string {
  const flags =
    '-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1'
  const folder = join(root, 'build', 'sanitized')
  const cmake = (...args: string[]): void => {
    execFileSync('cmake', args, { cwd: root, stdio: ['ignore', 'ignore', 'inherit'] })
  }
  cmake(
    '-S',
    '.',
    '-B',
    folder,
    '-DCMAKE_BUILD_TYPE=Release',
    '-DWITH_CUDA=OFF',
    `-DNODE=${process.execPath}`,
    `-DCMAKE_CXX_FLAGS=${flags}`,
    `-DCMAKE_MODULE_LINKER_FLAGS=-fsanitize=address,undefined`,
  ) // prettier-ignore
  cmake('--build', folder, '-j', String(availableParallelism()))
  return join(folder, 'Release', 'p2r_kernels.node')
}

/** test/native under ASan and UBSan: by libFuzzer where clang has it, else by a seed. */
function fuzzNative(inputs: number, seed: number, folder: string): NonNullable<Results['native']> {
  const program = join(folder, 'fuzz')
  const sources = readdirSync(join(root, 'ops')).filter((name) => name.endsWith('.cpp'))
  const build = (compiler: string, ...flags: string[]): void => {
    const checks = ['-fno-sanitize-recover=undefined', '-std=c++20', '-O1', '-g', '-I.']
    const files = ['test/native/fuzz.cpp', ...sources.map((name) => join('ops', name))]
    execFileSync(compiler, [...flags, ...checks, ...files, '-o', program], {
      cwd: root,
      stdio: 'pipe',
    })
  }
  let driver = 'libFuzzer'
  let args = [`-runs=${inputs}`, `-seed=${seed}`, '-verbosity=0']
  try {
    build('clang++', '-fsanitize=fuzzer,address,undefined')
  } catch {
    driver = 'seeded mutations'
    args = [String(inputs), String(seed)]
    build('g++', '-fsanitize=address,undefined', '-DP2R_FUZZ_MAIN')
  }
  const { status, stderr } = spawnSync(program, args, { encoding: 'utf8', cwd: folder })
  const faults = status === 0 ? [] : [stderr.split('\n').slice(0, 12).join(' | ')]
  return { driver, inputs, faults }
}

/** test/native/queue.cpp under ThreadSanitizer. */
function raceQueue(rounds: number, seed: number, folder: string): NonNullable<Results['queue']> {
  const program = join(folder, 'queue')
  const sources = readdirSync(join(root, 'ops')).filter((name) => name.endsWith('.cpp'))
  const files = ['test/native/queue.cpp', 'cpu/device.cpp', 'cpu/threads.cpp', 'cpu/host.cpp']
  const flags = ['-std=c++20', '-O1', '-g', '-I.', '-fsanitize=thread', '-o', program]
  const all = [...flags, ...files, ...sources.map((name) => join('ops', name))]
  execFileSync('g++', all, { cwd: root, stdio: 'pipe' })
  const { status, stderr } = spawnSync(program, [String(rounds), String(seed)], {
    encoding: 'utf8',
  })
  return { rounds, faults: status === 0 ? [] : [stderr.split('\n').slice(0, 12).join(' | ')] }
}

/** A whole tiny model of the tests, where there is one. */
async function modelIn(folder: string): Promise<string | undefined> {
  const unpack = join(root, 'scripts', 'unpack-golden.mjs')
  if (!existsSync(unpack)) return undefined
  const { unpackGolden } = (await import(unpack)) as {
    unpackGolden: (family: string) => { index: object; bytes: (path: string) => Buffer }
  }
  const { index, bytes } = unpackGolden('qwen3vl')
  const name = 'm1_d32_gqa2_tied'
  mkdirSync(folder, { recursive: true })
  for (const path of Object.keys(index)) {
    const [, file] = path.match(new RegExp(`${name}/([^/]+\\.(?:json|safetensors))$`)) ?? []
    if (file && file !== 'meta.json') writeFileSync(join(folder, file), bytes(path))
  }
  writeFileSync(join(folder, 'tokenizer.json'), JSON.stringify(byteTokenizer()))
  return folder
}

/** A tokenizer.json whose tokens are the bytes, and the special tokens of that model. */
function byteTokenizer(): object {
  const prints = (b: number) => (b > 0x20 && b < 0x7f) || (b > 0xa0 && b !== 0xad)
  let next = 0x100
  const bytes = Array.from({ length: 256 }, (_, b) => String.fromCharCode(prints(b) ? b : next++))
  const special = ['im_end', 'im_start', 'vision_start', 'vision_end', 'image_pad', 'video_pad']
  const flags = {
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  }
  return {
    version: '1.0',
    added_tokens: special.map((name, i) => ({ id: 501 + i, content: `<|${name}|>`, ...flags })),
    normalizer: null,
    pre_tokenizer: {
      type: 'ByteLevel',
      add_prefix_space: false,
      trim_offsets: false,
      use_regex: true,
    },
    post_processor: null,
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab: Object.fromEntries(bytes.map((b, i) => [b, i])), merges: [] },
  }
}

const program = new Command('reliability')
  .description('Tries what should not break the package, and counts.')
  .argument('[parts...]', `of ${parts.join(', ')}; all unless given`)
  .option('--quick', 'a small part of everything, in about a minute')
  .option('--seed <n>', 'of all random choices', whole, 1)
  .option('--calls <n>', 'hostile calls', whole)
  .option('--seconds <n>', 'of the soak', whole)
  .option('--sanitize', 'hostile calls also under ASan and UBSan, in an addon built for them')
  .addOption(
    new Option('--json <file>', 'where the results go').default(
      join('reliability', 'results.json'),
    ),
  )
  .option('--page', 'writes docs/reliability.md from the results')
  .action(async (chosen: string[], options: Options) => {
    for (const part of chosen)
      if (!parts.includes(part as Part)) throw new InvalidArgumentError(`There is no part ${part}.`)
    const file = resolve(root, options.json!)
    const before = existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as Results) : {}
    const results = await runParts((chosen.length ? chosen : parts) as Part[], options, before)
    writeFileSync(file, `${JSON.stringify(results, undefined, 1)}\n`)
    if (options.page) writeFileSync(join(root, 'docs', 'reliability.md'), pageOf(results))
  })

async function runParts(
  chosen: readonly Part[],
  options: Options,
  before: Results,
): Promise<Results> {
  const amount = amounts[options.quick ? 'quick' : 'full']
  const results: Results = {
    ...before,
    machine: `${cpus()[0]?.model ?? 'unknown'}, ${availableParallelism()} threads, Node ${process.version}`,
    date: new Date().toISOString().slice(0, 10),
  }
  const faults: string[] = []
  const finish = (title: string, said: string, found: readonly string[]): void => {
    console.log(`${title}: ${said}${found.length ? `; ${found.length} FAULTS` : ''}`)
    for (const fault of found.slice(0, 20)) console.log(`  ${fault}`)
    faults.push(...found)
  }
  const temporary = mkdtempSync(join(tmpdir(), 'p2r-reliability-'))
  const { seed } = options
  for (const part of chosen)
    if (part === 'fuzz') {
      const calls = options.calls ?? amount.calls
      results.fuzz = await fuzzAll(calls, seed, undefined)
      const { returned, refused, byName } = results.fuzz
      finish(
        'hostile calls',
        `${results.fuzz.calls} of ${Object.keys(byName).length} functions and methods, ${returned} returned, ${refused} refused`,
        results.fuzz.faults,
      ) // prettier-ignore
      if (!options.sanitize) continue
      results.sanitized = await fuzzAll(calls, seed + 1, buildSanitized())
      finish('under ASan and UBSan', `${results.sanitized.calls} calls`, results.sanitized.faults)
    } else if (part === 'native') {
      results.queue = raceQueue(amount.queueRounds, seed, temporary)
      finish('queue and pool', `4 threads, ${results.queue.rounds} rounds`, results.queue.faults)
      results.native = fuzzNative(amount.inputs, seed, temporary)
      finish(
        'native functions',
        `${results.native.inputs} inputs by ${results.native.driver}`,
        results.native.faults,
      ) // prettier-ignore
    } else if (part === 'files') {
      const bar = progress(part, amount.mutations)
      let done = 0
      results.files = await mutateFiles(
        seed,
        amount.mutations,
        join(temporary, 'files'),
        await modelIn(join(temporary, 'model')),
        () => bar.at(++done),
      ) // prettier-ignore
      bar.stop()
      const { mutations, read, refused, largestGrowth } = results.files
      finish(
        'broken files',
        `${mutations}: ${refused} refused, ${read} read, memory grew by ${Math.round(largestGrowth / 2 ** 20)} MiB at most`,
        results.files.faults,
      ) // prettier-ignore
    } else if (part === 'text') {
      results.text = await textGrowth(amount.letters)
      const { name, times } = results.text[0]!
      finish(
        'long texts',
        `${results.text.length} readers and texts of ${amount.letters} characters; the steepest is ${name}, ${times[1]!.toFixed(1)} ms at half and ${times[2]!.toFixed(1)} ms at full length`, // prettier-ignore
        results.text
          .filter((g) => g.times[2]! > 1000)
          .map((g) => `${g.name} takes ${Math.round(g.times[2]!)} ms`),
      ) // prettier-ignore
    } else if (part === 'writers') {
      results.writers = await interruptWriters(join(temporary, 'writers'), amount.kills)
      const { full, killed, readOnly } = results.writers
      finish(
        'interrupted writes',
        `${full} on a full disk, ${killed} killed, ${readOnly} where nothing may be written`,
        results.writers.faults,
      ) // prettier-ignore
    } else if (part === 'allocations') {
      results.allocations = await allocationFailures({
        seed,
        stride: amount.stride,
        folder: join(temporary, 'allocations'),
        model: await modelIn(join(temporary, 'model')),
      }) // prettier-ignore
      const { calls, failed, refused } = results.allocations
      finish(
        'failed allocations',
        `${failed} in ${calls} calls, ${refused} refused`,
        results.allocations.faults,
      ) // prettier-ignore
    } else if (part === 'workers') {
      const bar = progress(part, amount.terminations)
      results.workers = await terminateWorkers(amount.terminations, 8, (what) =>
        bar.at(Number(/\d+/.exec(what))),
      ) // prettier-ignore
      bar.stop()
      const { workers, terminated, slowest } = results.workers
      finish(
        'workers',
        `${workers} started, ${terminated} terminated while they computed, the slowest in ${Math.round(slowest)} ms`,
        results.workers.faults,
      ) // prettier-ignore
    } else if (part === 'slopes') {
      const bar = progress(part, soaked.length)
      results.slopes = []
      const failed: string[] = []
      for (const name of soaked) {
        const { out, failure } = await runModule('soak', [name, amount.rounds], {
          nodeArgs: ['--expose-gc', '--max-semi-space-size=1'],
        })
        if (failure === undefined) results.slopes.push(JSON.parse(out))
        else failed.push(`${name}: ${failure}`)
        bar.at(results.slopes.length, name)
      }
      bar.stop()
      results.slopes.sort((a, b) => b.bytesPerRound - a.bytesPerRound)
      const [steepest] = results.slopes
      finish(
        'memory',
        `${results.slopes.length} functions, ${amount.rounds} rounds each: ${steepest?.bytesPerRound.toFixed(0)} bytes a round at most (${steepest?.name})`, // prettier-ignore
        [
          ...failed,
          ...results.slopes
            .filter((s) => s.liveBytes !== 0)
            .map((s) => `${s.name}: ${s.liveBytes} bytes stay on the device`),
        ],
      ) // prettier-ignore
    } else if (part === 'soak') {
      const seconds = options.seconds ?? amount.seconds
      const bar = progress(part, seconds)
      results.soak = await soak(seconds, seed, (done) => bar.at(done * seconds))
      bar.stop()
      finish(
        'soak',
        `${results.soak.calls} calls in ${seconds} s, each checked against itself`,
        results.soak.faults,
      ) // prettier-ignore
    } else {
      results.delays = await eventLoopDelays(amount.scale)
      finish(
        'event loop',
        results.delays
          .map((d) => `${d.name} (${d.seconds.toFixed(1)} s): ${d.longest.toFixed(0)} ms`)
          .join('; '),
        [],
      ) // prettier-ignore
    }
  rmSync(temporary, { recursive: true, force: true })
  if (faults.length) process.exitCode = 1
  return results
}

await program.parseAsync()
