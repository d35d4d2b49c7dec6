// Benchmarks as they are distributed, by name: the files in a folder, and the categories in the order of the papers.
import { existsSync, statSync } from 'node:fs'
import { readdir } from 'node:fs/promises'
import { basename, extname, join, resolve } from 'node:path'
import { readText } from '../files.js'
import type { AnswerForm } from '../p2r/prompts.js'
import { type Layout, type Row, readJsonl, rowOf } from './questions.js'
import { readSpan, readTsv, type Span } from './tsv.js'
import { UsageError } from './usage.js'

export const benchmarkNames = [
  'vstar',
  'hr-bench-4k',
  'hr-bench-8k',
  'mme-realworld-lite',
  'zoombench',
  'visualprobe',
] as const
export type BenchmarkName = (typeof benchmarkNames)[number]

interface Benchmark extends Layout {
  /** Where the questions are in the folder, the first that exists. */
  files: readonly string[]
  /** The form of questions whose options and answer do not tell it. */
  form: AnswerForm
  /** What the files have as category, and what the paper calls it. */
  names: Readonly<Record<string, string>>
  /** What the fields of an entry mean, where the names of questions.ts do not say so. */
  entry?: (entry: Record<string, unknown>) => Record<string, unknown>
  /** Further questions in the folder beside a file, which each may have. */
  folders?: readonly string[]
}

/**
 * V*: 115 questions about attributes and 76 about positions. Hugging Face craigwu/vstar_bench has test_questions.jsonl and
 * two folders of images, each with a JSON of target_object, bbox, question and options, of which the first is right;
 * VLMEvalKit VStarBench.tsv. Source: Wu and Xie 2023, https://github.com/penghao-wu/vstar; lmms-eval, tasks/vstar_bench.
 */
const vstar: Benchmark = {
  files: ['test_questions.jsonl', 'vstar_bench.jsonl', 'VStarBench.tsv'],
  folders: ['direct_attributes', 'relative_position'],
  form: 'mca',
  names: { direct_attributes: 'Attribute', relative_position: 'Spatial' },
}

/**
 * HR-Bench: 200 questions, each in the four cyclic orders of its options: 800 rows. FSP is fine-grained single-instance,
 * FCP cross-instance perception. Hugging Face DreamMr/HR-Bench, hr_bench_4k.tsv and hr_bench_8k.tsv: index, question,
 * image in base64, A to D, answer, category, cycle_category. Source: Wang et al. 2024, arXiv:2408.15556; VLMEvalKit,
 * dataset/image_mcq.py and utils/hrbench.py, which averages over the orders.
 */
const hrBench = (size: '4k' | '8k'): Benchmark => ({
  files: [`hr_bench_${size}.tsv`, `HRBench${size.toUpperCase()}.tsv`, `hrbench_${size}.jsonl`],
  form: 'mca',
  names: { single: 'FSP', cross: 'FCP' },
})

/**
 * MME-RealWorld-Lite: 1919 questions with options A to E. Hugging Face yifanzhang114/MME-RealWorld-Lite, data.zip: a
 * list of Question_id, Image, Text, Answer choices, Ground truth, Category, Subtask and Task, and the images in imgs;
 * VLMEvalKit MME-RealWorld-Lite.tsv with category and l2-category. Source: Zhang et al. 2024, arXiv:2408.13257;
 * https://github.com/yfzhang114/MME-RealWorld, evaluation/eval_your_results.py.
 */
const mmeRealWorldLite: Benchmark = {
  files: ['', 'data/'].flatMap((folder) => [
    `${folder}MME-RealWorld-Lite.json`,
    `${folder}MME_RealWorld_Lite.json`,
    `${folder}MME-RealWorld-Lite.tsv`,
  ]),
  imageFolders: ['.', 'imgs', 'data', 'data/imgs'],
  form: 'mca',
  grouped: true,
  names: Object.fromEntries(
    ['Perception', 'Reasoning'].flatMap((task) =>
      [
        ['OCR with Complex Context', 'OCR'],
        ['Remote Sensing', 'RS'],
        ['Diagram and Table', 'DT'],
        ['Monitoring', 'MO'],
        ['Autonomous_Driving', 'AD'],
      ].map(([domain, short]) => [`${task}/${domain}`, `${task}/${short}`]),
    ),
  ),
  entry: ({ Task, Subtask, category, ...entry }) => {
    // VLMEvalKit's has Task/Subtask, in small letters for some.
    const [task = '', domain = ''] = Task === undefined ? String(category).split('/') : []
    const named = `${Task ?? `${task.charAt(0).toUpperCase()}${task.slice(1)}`}/${Subtask ?? domain}`
    return {
      ...entry,
      category: named,
      id: entry.Question_id ?? entry.index,
      image: entry.Image ?? entry.image,
      question: entry.Text ?? entry.question,
      answer: entry['Ground truth'] ?? entry.answer,
      options: entry['Answer choices'] ?? listOf(entry['multi-choice options']),
    }
  },
}

/**
 * ZoomBench: 845 questions on six dimensions, with options or without. zoombench.json as the authors' utils/convert_benchmark.py
 * writes it from Hugging Face inclusionAI/ZoomBench: images, crop_images, query, response. Source: Wei et al. 2026,
 * arXiv:2602.11858; https://github.com/inclusionAI/Zooming-without-Zooming.
 */
const zoomBench: Benchmark = {
  files: ['zoombench.json', 'zoombench.jsonl', 'ZoomBench.tsv'],
  form: 'free_form',
  names: {},
  entry: ({ images, query, prompt, response, ...entry }) => ({
    ...entry,
    image: entry.image ?? firstOf(images),
    question: entry.question ?? textOf(query ?? prompt),
    answer: entry.answer ?? response,
  }),
}

/**
 * VisualProbe: 500 questions with short answers, easy, medium and hard, judged by a model. Hugging Face
 * Mini-o3/VisualProbe_Easy, _Medium and _Hard, each a folder with val.json: images, question, answer. Source: Lai et al. 2025,
 * arXiv:2509.07969; https://github.com/Mini-o3/Mini-o3.
 */
const visualProbe: Benchmark = {
  files: [],
  folders: ['VisualProbe_Hard', 'VisualProbe_Medium', 'VisualProbe_Easy'],
  form: 'free_form',
  names: { VisualProbe_Hard: 'hard', VisualProbe_Medium: 'medium', VisualProbe_Easy: 'easy' },
  imageFolders: ['.', '..'],
  entry: ({ images, question, ...entry }) => ({
    ...entry,
    image: entry.image ?? firstOf(images),
    question: textOf(question),
  }),
}

const benchmarks: Record<BenchmarkName, Benchmark> = {
  vstar,
  'hr-bench-4k': hrBench('4k'),
  'hr-bench-8k': hrBench('8k'),
  'mme-realworld-lite': mmeRealWorldLite,
  zoombench: zoomBench,
  visualprobe: visualProbe,
}

/** The order of the paper's categories, and whether they are in groups. */
export function layoutOf(name: BenchmarkName): { order: string[]; grouped: boolean } {
  const { names, grouped = false } = benchmarks[name]
  return { order: Object.values(names), grouped }
}

/** The questions of a benchmark in order, of the folder that holds it or of one of its files. */
export async function* readBenchmark(name: BenchmarkName, path: string): AsyncGenerator<Row> {
  const benchmark = benchmarks[name]
  let line = 0
  for await (const { entry, file, image } of entriesOf(benchmark, name, path)) {
    line++
    const row = benchmark.entry?.(entry) ?? entry
    const category = String(row.category ?? 'all')
    yield rowOf({ ...row, category: benchmark.names[category] ?? category }, line, file, {
      form: formOf(row, benchmark.form),
      ...(benchmark.imageFolders && { imageFolders: benchmark.imageFolders }),
      ...(image && { image }),
    })
  }
}

interface Entry {
  entry: Record<string, unknown>
  /** The file that the entry is of. */
  file: string
  /** The image in base64, where a table has it. */
  image?: { span: Span; id: string }
}

async function* entriesOf(
  { files, folders = [] }: Benchmark,
  name: string,
  path: string,
): AsyncGenerator<Entry> {
  if (!existsSync(path)) throw new UsageError(`there is no ${path}`)
  if (!statSync(path).isDirectory()) return yield* entriesIn(path)
  const found = files.map((file) => join(path, file)).find((file) => existsSync(file))
  if (found) return yield* entriesIn(found)
  const own = folders.filter((folder) => existsSync(join(path, folder)))
  // The folder of one part by itself.
  if (!own.length && folders.includes(basename(resolve(path))))
    return yield* entriesOfFolder(resolve(path), basename(resolve(path)))
  if (!own.length)
    throw new UsageError(
      `${path} does not hold ${name}: there is none of ${[...files, ...folders].join(', ')}. Parquet files ` +
        'are not read: write them as JSON Lines first, with datasets.load_dataset(...).to_json(...)',
    )
  for (const folder of own) yield* entriesOfFolder(join(path, folder), folder)
}

/** A folder of a category: one list, or a JSON beside each image. */
async function* entriesOfFolder(folder: string, category: string): AsyncGenerator<Entry> {
  const list = ['val.json', 'val.jsonl']
    .map((file) => join(folder, file))
    .find((f) => existsSync(f))
  if (list) {
    for await (const each of entriesIn(list)) yield { ...each, entry: { ...each.entry, category } }
    return
  }
  const names = (await readdir(folder)).sort()
  for (const [i, json] of names.filter((file) => file.endsWith('.json')).entries()) {
    const file = join(folder, json)
    const stem = basename(json, '.json')
    const image = names.find((other) => other !== json && basename(other, extname(other)) === stem)
    if (!image) throw new UsageError(`${file} has no image beside it`)
    const { question, options } = (await jsonIn(file)) as Record<string, unknown>
    if (!Array.isArray(options)) throw new UsageError(`${file} has no list of options`)
    // The first is right. Rotated, so that the right letter is not always the same.
    const turn = i % Math.max(1, options.length)
    const rotated = [
      ...options.slice(options.length - turn),
      ...options.slice(0, options.length - turn),
    ]
    const answer = 'ABCDEFGH'[turn]
    yield {
      file,
      entry: { id: `${category}/${stem}`, image, question, options: rotated, answer, category },
    }
  }
}

async function* entriesIn(file: string): AsyncGenerator<Entry> {
  const kind = extname(file)
  if (kind === '.jsonl') for await (const entry of readJsonl(file)) yield { entry, file }
  else if (kind === '.json') {
    const list = await jsonIn(file)
    if (!Array.isArray(list)) throw new UsageError(`${file} must be a list of questions`)
    for (const entry of list as Record<string, unknown>[]) yield { entry, file }
  } else if (kind === '.tsv') yield* entriesOfTable(file)
  else throw new UsageError(`${file} must be a folder, or end in .tsv, .json or .jsonl`)
}

/** VLMEvalKit's tables: a short image is the index of the row that has it. */
async function* entriesOfTable(file: string): AsyncGenerator<Entry> {
  const spans = new Map<string, Span>()
  for await (const { fields, large } of readTsv(file, 'image')) {
    const index = fields.get('index') ?? ''
    const id = large ? index : (fields.get('image') ?? '')
    if (large) spans.set(index, large)
    const span = spans.get(id)
    const entry = Object.fromEntries([...fields].filter(([, text]) => text !== ''))
    yield { entry, file, ...(span && { image: { span, id } }) }
  }
}

async function jsonIn(file: string): Promise<unknown> {
  const text = await readText(file)
  try {
    return JSON.parse(text)
  } catch (cause) {
    throw new UsageError(`${file} is not JSON: ${(cause as Error).message}`)
  }
}

/** A letter is the answer to options, a number is a number; what is left is the benchmark's form. */
function formOf({ answer }: Record<string, unknown>, form: AnswerForm): AnswerForm {
  if (form !== 'free_form') return form
  const text = String(answer ?? '').trim()
  if (/^[A-H]$/.test(text)) return 'mca'
  return /^[+-]?\d+(\.\d+)?$/.test(text) ? 'na' : form
}

/** A list that a table has as Python's or JSON's text. */
function listOf(text: unknown): unknown {
  if (typeof text !== 'string') return text
  try {
    return JSON.parse(text)
  } catch {
    return [...text.matchAll(/(?<!\\)(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")/g)].map(
      ([, single, double]) => (single ?? double ?? '').replace(/\\(.)/g, '$1'),
    )
  }
}

function firstOf(images: unknown): unknown {
  return Array.isArray(images) ? images[0] : images
}

/** Without the mark of where the image is. */
function textOf(question: unknown): unknown {
  return typeof question === 'string' ? question.replaceAll('<image>', '').trim() : question
}

/** The bytes of an image in a table. */
export async function imageIn(span: Span): Promise<Uint8Array> {
  return Buffer.from((await readSpan(span)).toString('latin1'), 'base64')
}
