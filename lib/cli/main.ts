#!/usr/bin/env node
// The command p2r-kernels. Results go to standard output, everything else to standard error. Exit
// codes: 0; 1 for a failure; 2 for an invalid command line; 130 after Ctrl-C.
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Command, CommanderError, InvalidArgumentError, Option } from 'commander'
import { cudaStatus, devices, openDevice } from '../device.js'
import { readText } from '../files.js'
import { loadImage, saveImage } from '../image.js'
import { answer } from '../p2r/answer.js'
import { parseBoxes } from '../p2r/boxes.js'
import { collectEvidence, type Evidence } from '../p2r/evidence.js'
import { hasCredentials } from '../p2r/openai.js'
import { type AnswerForm, answerForms } from '../p2r/prompts.js'
import type { RewardRules } from '../p2r/reward.js'
import { benchmarkNames } from './benchmarks.js'
import { type EvaluateOptions, evaluateCommand } from './evaluate.js'
import {
  type CropOptions,
  evidenceOptions,
  LocalModels,
  type Method,
  methods,
  type RoleOptions,
  rolesOf,
} from './roles.js'
import { type ServeCommandOptions, serveCommand } from './serve.js'
import { type TrainCommandOptions, trainCommand } from './train.js'
import { UsageError } from './usage.js'

const { version } = JSON.parse(
  readFileSync(new URL('../../../package.json', import.meta.url), 'utf8'),
) as { version: string }

function integerFrom(least: number): (text: string) => number {
  return (text) => {
    const value = Number(text)
    if (/^\d+$/.test(text) && value >= least && Number.isSafeInteger(value)) return value
    throw new InvalidArgumentError(`It should be an integer of at least ${least}.`)
  }
}

function nonNegative(text: string): number {
  const value = Number(text)
  if (text.trim() !== '' && value >= 0 && Number.isFinite(value)) return value
  throw new InvalidArgumentError('It should be a number of at least 0.')
}

function seeds(text: string): number[] {
  const all = text.split(',').map(integerFrom(0))
  if (new Set(all).size === all.length) return all
  throw new InvalidArgumentError('Each seed should be there once.')
}

function url(text: string, before: string[] = []): string[] {
  if (/^https?:\/\//.test(text) && URL.canParse(text) && !hasCredentials(text))
    return [...before, text]
  if (hasCredentials(text))
    throw new InvalidArgumentError('It must not hold a password; give a key by --api-key.')
  throw new InvalidArgumentError('It should be an address such as http://localhost:8000/v1.')
}

const program = new Command('p2r-kernels')
  .description(
    'Perceive-to-Reason on vision-language models, served or run here: perceive, crop, reason.',
  )
  .version(version)
  .exitOverride()
  .configureOutput({
    outputError: (text, write) => write(text.replace(/^error: /, 'p2r-kernels: ')),
  })

const formOption = () =>
  new Option('--form <form>', 'how questions are answered: by a letter, a number or text')
    .choices(answerForms)
    .default('mca')
const deviceOption = () =>
  new Option('--device <id>', "'cpu', 'cuda', 'cuda:1' (default: $P2R_DEVICE, else CUDA, else CPU)")
const rulesOption = (of: string) =>
  new Option('--rules <rules>', of).choices(['reference', 'strict']).default('reference')
const quantizeOption = () =>
  new Option('--quantize <bits>', 'of the weights of a checkpoint that is run here').choices([
    '8',
    '4',
  ])
const cropOptions = (command: Command): Command =>
  command
    .option('--max-evidence <n>', 'crops at most', integerFrom(0), 3)
    .option('--padding <share>', "of a region on each side, of the image's size", nonNegative, 0.1)
    .option('--max-pixels <n>', 'of the image and of each region', integerFrom(1), 4096 * 32 * 32)
    .option('--min-pixels <n>', 'likewise', integerFrom(1), 16 * 32 * 32)
    .addOption(
      new Option('--resize-rules <rules>', 'of the sizes of images and regions')
        .choices(['qwen-vl-utils', 'transformers'])
        .default('qwen-vl-utils'),
    )
    .addOption(
      new Option(
        '--coordinates <unit>',
        "of boxes: 'thousandths' (Qwen3-VL) or 'absolute', pixels of the image shown (Qwen2.5-VL)",
      )
        .choices(['thousandths', 'absolute'])
        .default('thousandths'),
    )
    .option(
      '--auto-orient',
      'applies the EXIF orientation of photos; boxes refer to the result',
      false,
    )

const methodOption = (choices: readonly string[]) =>
  new Option(
    '--method <method>',
    "'two-stage' perceives, then reasons; 'zoom' lets the model call image_zoom_in_tool",
  )
    .choices(choices)
    .default('two-stage')

/** Options of the commands that call models. */
function servedOptions(command: Command, concurrency: number): Command {
  command
    .option(
      '--base-url <url>',
      'of the OpenAI API; repeat it for more servers of the same model',
      url,
    )
    .option(
      '--model <name>',
      "with --base-url the served model (default: the only one); without, a checkpoint's folder, which is run here",
    )
  for (const part of ['perceiver', 'reasoner'])
    command
      .option(`--${part}-url <url>`, `of the ${part}, where it has a server of its own`, url)
      .option(`--${part}-model <name>`, `of the ${part}, likewise`)
  return cropOptions(command)
    .option(
      '--pixel-budget <n>',
      'pixels of all images that a question is answered from (default: 2 + max-evidence times max-pixels)',
      integerFrom(1),
    )
    .option('--max-turns <n>', 'requests of --method zoom for an answer', integerFrom(1), 6)
    .addOption(
      new Option(
        '--tool-calls <how>',
        "of --method zoom: the API's, or in text for servers without",
      )
        .choices(['api', 'text'])
        .default('api'),
    )
    .option('--api-key <key>', 'default: $OPENAI_API_KEY')
    .option('--temperature <t>', 'of both roles', nonNegative, 0)
    .option('--timeout <seconds>', 'of one request', nonNegative, 300)
    .option('--stream', 'streams responses, so that proxies see no idle connection')
    .option('--retries <n>', 'after the first attempt', integerFrom(0), 3)
    .option('--concurrency <n>', 'requests in flight', integerFrom(1), concurrency)
    .option('--no-thinking', 'switches the thinking of Qwen3.5 and later off')
    .addOption(
      new Option(
        '--reproduction',
        "the settings of the reference's own evaluation: sampling, lengths, sizes and PNG",
      ).conflicts(['temperature', 'imageFormat', 'maxPixels', 'minPixels', 'pixelBudget']),
    )
    .addOption(
      new Option('--image-format <format>', 'encoding of the images that are sent')
        .choices(['jpeg', 'png'])
        .default('jpeg'),
    )
    .addOption(rulesOption('of reading boxes and answers, and of scoring'))
    .addOption(formOption())
    .addOption(deviceOption())
    .addOption(quantizeOption())
}

function port(text: string): number {
  const value = integerFrom(0)(text)
  if (value < 65_536) return value
  throw new InvalidArgumentError('It should be a port, at most 65535.')
}

program
  .command('serve')
  .description(
    'serves a checkpoint by the OpenAI chat API: /v1/chat/completions, /v1/models, /health',
  )
  .requiredOption('--model <folder>', "a Qwen3-VL checkpoint's folder")
  .option('--name <name>', "what requests call the model (default: the folder's name)")
  .option(
    '--host <address>',
    'to listen on; others than loopback let other machines in',
    '127.0.0.1',
  )
  .option('--port <n>', '0 for any that is free', port, 8000)
  .option('--api-key <key>', 'that requests must have (default: $P2R_API_KEY, else none)')
  .option('--max-tokens <n>', 'of requests that do not say', integerFrom(1), 2048)
  .addOption(
    new Option('--logprobs-mode <mode>', 'of temperature 1, or of that of the request')
      .choices(['raw_logprobs', 'processed_logprobs'])
      .default('raw_logprobs'),
  )
  .addOption(deviceOption())
  .addOption(quantizeOption())
  .action(async (options: ServeCommandOptions) => {
    process.exitCode = await serveCommand(options)
  })

program
  .command('train')
  .description('trains a checkpoint by PRA-GRPO here; run it again to resume')
  .argument('<data>', 'a question a line, as of evaluate, answered by a letter or a number')
  .requiredOption('--model <folder>', "a Qwen3-VL checkpoint's folder")
  .requiredOption(
    '--out <folder>',
    "of the run's state, metrics.jsonl, index.html and the trained model",
  )
  .option('--steps <n>', 'updates', integerFrom(1), 100)
  .option('--batch <n>', 'questions a step', integerFrom(1), 64)
  .option('--group <n>', 'rollouts a question', integerFrom(2), 8)
  .addOption(
    new Option(
      '--stages <stages>',
      "the perceiver's half, then the reasoner's; or in turns; or both",
    )
      .choices(['two-stage', 'alternating', 'joint'])
      .default('two-stage'),
  )
  .option('--lr <rate>', 'the highest learning rate', nonNegative, 1e-6)
  .option('--warmup <n>', 'steps over which it rises', integerFrom(0), 0)
  .addOption(
    new Option('--decay <how>', 'of the learning rate')
      .choices(['constant', 'cosine'])
      .default('constant'),
  )
  .option('--lora <rank>', 'trains a low-rank change', integerFrom(1))
  .option('--freeze-tower', 'leaves the vision tower as it is')
  .option('--checkpoint', 'computes blocks again in the backward pass, for memory')
  .option('--micro-tokens <n>', 'of one pass forward and backward', integerFrom(1), 16_384)
  .option('--max-tokens <n>', "of each role's output", integerFrom(1), 1024)
  .option('--max-pixels <n>', 'of the image and of each region', integerFrom(1), 4096 * 32 * 32)
  .option('--min-pixels <n>', 'likewise', integerFrom(1), 16 * 32 * 32)
  .option('--save-every <n>', 'steps between saved states', integerFrom(1), 10)
  .option('--validate <file>', 'questions that are answered with the weights of some steps')
  .option('--validate-every <n>', 'after so many steps, and the last', integerFrom(1), 10)
  .option('--seed <n>', 'of all random numbers', integerFrom(0), 0)
  .addOption(formOption())
  .addOption(deviceOption())
  .action(async (data: string, options: TrainCommandOptions) => {
    process.exitCode = await trainCommand(data, options)
  })

program
  .command('devices')
  .description('lists the available devices')
  .option('--json', 'as JSON')
  .action(({ json }: { json?: boolean }) => {
    const all = devices()
    if (json) return console.log(JSON.stringify({ devices: all, cuda: cudaStatus() }, null, 2))
    for (const { id, name, memoryBytes, threads, simd, computeCapability } of all)
      console.log(
        [
          id.padEnd(8),
          name,
          `${(memoryBytes / 2 ** 30).toFixed(1)} GiB`,
          ...(threads ? [`${threads} threads`] : []),
          ...(simd ? [simd] : []),
          ...(computeCapability ? [`compute capability ${computeCapability}`] : []),
        ].join('  '),
      )
    console.error(cudaStatus().reason)
  })

program
  .command('build')
  .description('builds the native addon from source: a C++20 compiler and CMake or make are needed')
  .addOption(
    new Option('--cuda <when>', 'for NVIDIA GPUs too; auto: where nvcc is found')
      .choices(['auto', 'on', 'off'])
      .default('auto'),
  )
  .action(({ cuda }: { cuda: string }) => {
    const script = fileURLToPath(new URL('../../../scripts/addon.mjs', import.meta.url))
    const { status } = spawnSync(process.execPath, [script, `--cuda=${cuda}`], { stdio: 'inherit' })
    process.exitCode = status ?? 1
  })

program
  .command('bench')
  .description('times operations, beside what else computes them and what the machine can do')
  .argument('[args...]', '--help lists operations and options')
  .helpOption(false)
  .allowUnknownOption()
  .action((args: string[]) => {
    const script = fileURLToPath(new URL('../../bench/main.js', import.meta.url))
    const { status } = spawnSync(process.execPath, [script, ...args], { stdio: 'inherit' })
    process.exitCode = status ?? 1
  })

servedOptions(
  program
    .command('answer')
    .description('answers a question about an image')
    .argument('<image>', 'a file: JPEG, PNG, WebP, GIF, TIFF, AVIF or BMP')
    .argument('<question>', 'with its options, if it has any')
    .option('--out <folder>', 'output folder for the annotated image and the crops')
    .option('--json', 'prints the whole result as JSON')
    .addOption(methodOption(methods)),
  4,
).action(
  async (
    file: string,
    question: string,
    options: RoleOptions & {
      form: AnswerForm
      method: Method
      device?: string
      out?: string
      json?: boolean
    },
  ) => {
    using device = openDevice(options.device)
    const models = new LocalModels(device, options)
    const { answerer } = await rolesOf(options, models, options.method)
    const image = await loadImage(file, device, { autoOrient: options.autoOrient })
    const made = await answer({ ...answerer, image, question, answerForm: options.form })
    const { evidence, perception, reasoning, truncated, requests, pixels } = made
    for (const role of truncated)
      console.error(`The limit of tokens cut off the output of the ${role}.`)
    const files = options.out === undefined ? [] : await saveEvidence(evidence, options.out)
    if (options.json) {
      const { boxes, hasEvidence } = evidence
      const result = {
        answer: made.answer,
        boxes,
        hasEvidence,
        perception,
        reasoning,
        truncated,
        // What an agent called, and what it was told; the crops are among the files.
        turns: made.turns.map(({ completion, results }) => ({
          text: completion.text,
          toolCalls: completion.toolCalls ?? [],
          results: results.map(({ text }) => text),
        })),
        requests,
        pixels,
        files,
      }
      console.log(JSON.stringify(result, null, 2))
    } else if (made.answer !== '') console.log(made.answer)
    if (made.answer === '')
      throw new Error(
        made.outOfTurns
          ? `there is no answer after ${requests} turns; see --max-turns`
          : `there is no answer in the reasoner's output: ${reasoning}`,
      )
  },
)

cropOptions(
  program
    .command('evidence')
    .description('draws boxes on an image and crops them, as the reasoner sees them')
    .argument('<image>', 'a file: JPEG, PNG, WebP, GIF, TIFF, AVIF or BMP')
    .requiredOption('--boxes <json>', "a perceiver's output, or @FILE with it")
    .requiredOption('--out <folder>', 'output folder for the annotated image and the crops'),
)
  .addOption(rulesOption('of reading the boxes'))
  .addOption(deviceOption())
  .action(
    async (
      file: string,
      options: CropOptions & {
        boxes: string
        out: string
        rules: RewardRules
        device?: string
      },
    ) => {
      const text = options.boxes.startsWith('@')
        ? await readText(options.boxes.slice(1))
        : options.boxes
      const boxes = parseBoxes(text, { rules: options.rules })
      if (!boxes.length)
        throw new UsageError(
          'there is no box in --boxes; expected [{"bbox_2d": [x0, y0, x1, y1], "label": "..."}]',
        )
      using device = openDevice(options.device)
      const image = await loadImage(file, device, { autoOrient: options.autoOrient })
      using evidence = collectEvidence({ image, boxes, ...evidenceOptions(options) })
      for (const path of await saveEvidence(evidence, options.out)) console.log(path)
      if (evidence.hasEvidence && evidence.dropped)
        console.error(`Without a crop: ${evidence.dropped}, outside the image or too thin.`)
      if (!evidence.hasEvidence)
        console.error('No box is inside the image: the reasoner would see the image unchanged.')
    },
  )

servedOptions(
  program
    .command('evaluate')
    .description('answers and scores a file of questions, or a benchmark; run it again to resume')
    .argument(
      '<data>',
      'a question a line: image, question or text, options or A to D, answer or label, category; with --benchmark its folder or file',
    )
    .addOption(
      new Option('--benchmark <name>', 'reads DATA as the benchmark is distributed').choices(
        benchmarkNames,
      ),
    )
    .addOption(methodOption([...methods, 'both']))
    .option('--seeds <list>', 'a run for each: 1,2,3; the servers sample with it', seeds)
    .option('--out <file>', 'results, a line a question (default: DATA.results.jsonl)')
    .option('--json <file>', 'writes the table as JSON')
    .option('--limit <n>', 'only the first n questions', integerFrom(1))
    .option('--verifier-url <url>', 'of the model that judges free-form answers', url)
    .option('--verifier-model <name>', 'likewise'),
  32,
).action(async (data: string, options: EvaluateOptions) => {
  process.exitCode = await evaluateCommand(data, options)
})

/** Writes the images that the reasoner sees, as PNG, and the boxes. */
async function saveEvidence(evidence: Evidence, folder: string): Promise<string[]> {
  await mkdir(folder, { recursive: true })
  const paths = [join(folder, 'annotated.png'), join(folder, 'boxes.json')]
  await saveImage(evidence.annotated, paths[0]!)
  const boxes = evidence.boxes.map(({ bbox2d, label }) => ({ bbox_2d: bbox2d, label }))
  await writeFile(paths[1]!, `${JSON.stringify(boxes, null, 2)}\n`)
  for (const [i, crop] of evidence.crops.entries()) {
    paths.push(join(folder, `crop-${i + 1}.png`))
    await saveImage(crop, paths.at(-1)!)
  }
  return paths
}

try {
  await program.parseAsync()
} catch (error) {
  if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : 2
  else {
    console.error(`p2r-kernels: ${error instanceof Error ? error.message : error}`)
    process.exitCode = error instanceof UsageError ? 2 : 1
  }
}
