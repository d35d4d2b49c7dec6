// The documents: each of their programs compiles in strict mode, runs, and prints what its comments say.
// Those of docs/api are the examples of the exports' comments.
import { execFile, spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { type Device, openDevice, saveImage, saveTensors } from 'p2r-kernels'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { exportsOf, lacks, pagesOf } from '../scripts/reference.mjs'
import { type ChatServer, chatServer, says } from './chat_server.js'
import { writeModel } from './golden_model.js'
import { writeTokenizer } from './tiny_tokenizer.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const read = (path: string) => readFileSync(join(root, path), 'utf8')
const api = readdirSync(join(root, 'docs/api'))
const documents = [
  ...['.', 'docs', 'bench'].flatMap((folder) =>
    readdirSync(join(root, folder))
      .filter((name) => name.endsWith('.md'))
      .map((name) => join(folder, name)),
  ),
  ...readdirSync(join(root, 'examples')).map((name) => join('examples', name, 'README.md')),
  ...api.map((name) => join('docs/api', name)),
]

interface Block {
  document: string
  line: number
  language: string
  text: string
}

/** The fenced blocks of a document. Declarations ('ts declaration') are no programs. */
function blocksOf(document: string): Block[] {
  const text = read(document)
  return [...text.matchAll(/^```(.*)\n([\s\S]*?)^```$/gm)].map((match) => ({
    document,
    line: text.slice(0, match.index).split('\n').length,
    language: match[1]!,
    text: match[2]!,
  }))
}

const exported = exportsOf(root)
const blocks = documents.flatMap(blocksOf)
const programs = blocks
  .filter(({ language }) => language === 'js' || language === 'ts')
  .map((block) => ({
    ...block,
    name: `${block.document.replaceAll(/\W/g, '_')}_${block.line}`,
    title: `${block.document}:${block.line}`,
  }))
const commands = blocks
  .filter(({ language }) => language === 'sh')
  .flatMap(({ document, text }) =>
    text
      .replaceAll('\\\n', ' ')
      .split(/\n|&&/)
      .map((line) => ({ document, words: wordsOf(line) })),
  )

/** A line of shell without its comment, as words. */
function wordsOf(line: string): string[] {
  const found = [...line.matchAll(/'([^']*)'|"([^"]*)"|(#.*)|(\S+)/g)]
  return found.flatMap(([, single, double, comment, bare]) =>
    comment === undefined ? [single ?? double ?? bare!] : [],
  )
}

// Within the package, so that programs find it by its name.
mkdirSync(join(root, 'build'), { recursive: true })
const folder = mkdtempSync(join(root, 'build/docs-'))
let server: ChatServer
let environment: NodeJS.ProcessEnv
afterAll(async () => {
  rmSync(folder, { recursive: true })
  await server.close()
})

const run = promisify(execFile)
const outcomes = new Map<string, { printed: string[]; error?: string }>()
let typeErrors = ''

/** Compiles all programs at once, and runs them in one process. */
beforeAll(async () => {
  for (const { name, text } of programs) writeFileSync(join(folder, `${name}.mts`), text)
  writeFileSync(
    join(folder, 'tsconfig.json'),
    JSON.stringify({
      extends: '../../test/consumer/tsconfig.json',
      compilerOptions: {
        types: ['node'],
        noEmit: false,
        outDir: 'out',
        rootDir: '.',
        // `strict` has neither, and few projects do; examples that satisfy them would be littered with `!`.
        noUncheckedIndexedAccess: false,
        exactOptionalPropertyTypes: false,
      },
      include: ['*.mts'],
    }),
  )
  const require = createRequire(import.meta.url)
  const tsc = join(dirname(require.resolve('typescript/package.json')), 'bin/tsc')
  const { stdout } = spawnSync(process.execPath, [tsc, '-p', folder], { encoding: 'utf8' })
  typeErrors = stdout
  // JavaScript runs as it stands.
  for (const { name, text, language } of programs)
    if (language === 'js') writeFileSync(join(folder, 'out', `${name}.mjs`), text)

  const files = join(folder, 'files')
  mkdirSync(files)
  const device = openDevice('cpu')
  const pixels = new Uint8Array(480 * 640 * 3).fill(90)
  await saveImage(device.tensor(pixels, [480, 640, 3], 'u8'), join(files, 'street.jpg'))
  await saveCheckpoint(join(files, 'P2R-4B'), device)
  writeTokenizer(writeModel(join(files, 'Qwen3-VL-2B-Instruct'), 'm1_d32_gqa2_tied'))
  device.dispose()
  const question = { image: 'street.jpg', text: 'What?\n(A) a\n(B) b', label: 'A', category: 'x' }
  writeFileSync(join(files, 'vstar.jsonl'), `${JSON.stringify(question)}\n`)
  mkdirSync(join(files, 'vstar_bench'))
  const beside = JSON.stringify({ ...question, image: '../street.jpg' })
  writeFileSync(join(files, 'vstar_bench', 'test_questions.jsonl'), `${beside}\n`)
  let replies = 0
  server = await chatServer(
    says(({ prompt }) => ({
      content: prompt.includes('bbox_2d')
        ? '[{"bbox_2d": [400, 300, 600, 500], "label": "sign"}]'
        : `<think>...</think><answer>${replies++ % 2 ? 'A' : 'B'}</answer>`,
      tokens: [5, 6, 7],
    })),
  )
  server.models = ['P2R-4B']
  environment = { ...process.env, P2R_DEVICE: 'cpu', P2R_TEST_SERVER: server.baseURL }
  const results = join(folder, 'results.jsonl')
  const paths = programs.map(({ name }) => join(folder, 'out', `${name}.mjs`))
  const runner = join(root, 'test/docs/run.mjs')
  await run(process.execPath, [runner, results, ...paths], { cwd: files, env: environment })
  for (const line of readFileSync(results, 'utf8').trimEnd().split('\n')) {
    const { program, ...outcome } = JSON.parse(line)
    outcomes.set(program, outcome)
  }
}, 120_000)

/** A vision tower of one small block, all of its weights 0, in Hugging Face's form. */
async function saveCheckpoint(path: string, device: Device): Promise<void> {
  const config = {
    depth: 1,
    hidden_size: 16,
    num_heads: 2,
    intermediate_size: 32,
    out_hidden_size: 24,
    patch_size: 16,
    num_position_embeddings: 16,
  }
  const layers: Record<string, [rows: number, columns?: number]> = {
    'patch_embed.proj': [16, 3 * 2 * 16 * 16],
    'blocks.0.norm1': [16],
    'blocks.0.norm2': [16],
    'blocks.0.attn.qkv': [48, 16],
    'blocks.0.attn.proj': [16, 16],
    'blocks.0.mlp.linear_fc1': [32, 16],
    'blocks.0.mlp.linear_fc2': [16, 32],
    'merger.norm': [16],
    'merger.linear_fc1': [64, 64],
    'merger.linear_fc2': [24, 64],
  }
  const weights = Object.entries(layers).flatMap(([name, [rows, columns]]) => [
    [`${name}.weight`, device.zeros(columns ? [rows, columns] : [rows])],
    [`${name}.bias`, device.zeros([rows])],
  ])
  mkdirSync(path)
  writeFileSync(join(path, 'config.json'), JSON.stringify(config))
  await saveTensors(join(path, 'model.safetensors'), {
    ...Object.fromEntries(weights),
    'pos_embed.weight': device.zeros([16, 16]),
  })
}

/** What a program says that it prints: the comments behind its calls of console.log. */
const promised = (text: string): string[] =>
  [...text.matchAll(/console\.log\(.*\) \/\/ (.*)$/gm)].map(([, comment]) => comment!)

const numbersOf = (text: string): string[] =>
  text.replaceAll(/\w+\(\d+\) \[/g, '[').match(/(?<![\w.])-?\d[\d_]*(?:\.\d+)?(?:e[-+]?\d+)?/g) ??
  []

/** Whether it is the text, or names its numbers, in order and as rounded as they are there. */
function agrees(comment: string, printed: string): boolean {
  const plain = (text: string) => text.replaceAll(/[\s'"]/g, '')
  if (plain(printed).includes(plain(comment))) return true
  const expected = numbersOf(comment)
  const found = numbersOf(printed)
  return (
    expected.length > 0 &&
    found.length >= expected.length &&
    expected.every((number, i) => {
      const decimals = number.split('.')[1]?.length ?? 0
      return Math.abs(Number(number) - Number(found[i])) <= 0.5001 * 10 ** -decimals
    })
  )
}

test('every program compiles in strict mode', () => {
  expect(programs.length).toBeGreaterThan(70)
  expect(typeErrors).toBe('')
})

test.each(programs)('$title runs and prints what it says', ({ name, text }) => {
  const outcome = outcomes.get(join(folder, 'out', `${name}.mjs`))
  expect(outcome, 'the programs before it ended the process').toBeDefined()
  expect(outcome!.error).toBeUndefined()
  let at = 0
  for (const comment of promised(text)) {
    const found = outcome!.printed.findIndex((line, i) => i >= at && agrees(comment, line))
    expect(found, `${comment} in ${outcome!.printed.slice(at)}`).not.toBe(-1)
    at = found + 1
  }
})

test('comments are compared with what is printed', () => {
  expect(agrees('[6, 2, 8] and [2, 6]', '[ 6, 2, 8 ] [ 2, 6 ]')).toBe(true)
  expect(agrees('-0.159, 0', 'Float32Array(2) [ -0.15865525603294373, 0 ]')).toBe(true)
  expect(agrees('-0.158, 0', 'Float32Array(2) [ -0.15865525603294373, 0 ]')).toBe(false)
  expect(agrees('a letter', 'another')).toBe(false)
})

test('every export is documented as a reference needs it', () => {
  expect(exported.flatMap(lacks)).toEqual([])
})

test('docs/api is what npm run docs makes', () => {
  const pages = pagesOf(exported, root)
  expect(api.toSorted()).toEqual([...pages.keys()].toSorted())
  for (const [name, text] of pages)
    expect(read(join('docs/api', name)) === text, `${name}: npm run docs makes it`).toBe(true)
})

test('what a reference needs is noticed where it is missing', () => {
  const doc = { text: '', tags: [{ name: 'param', text: 'a.x the input' }] }
  const field = {
    name: 'x',
    optional: false,
    type: 'Tensor',
    doc: { text: 'The input.', tags: [] },
  }
  const item = { file: '', signatures: [], doc, fields: [field], members: [] }
  expect(lacks({ ...item, name: 'f', kind: 'function' })).toEqual([
    'f: no description',
    'f: no single @example',
    'f: no @throws, with codes',
    'f: no interface for @param a.x',
    'f.x: no shape',
  ])
})

test('the README is at most 8 kB', () => {
  expect(Buffer.byteLength(read('README.md'))).toBeLessThanOrEqual(8000)
})

test('commands of the documents exist', () => {
  const { scripts } = JSON.parse(read('package.json'))
  const used = commands.flatMap(({ words }) => {
    if (words[0] !== 'npm') return []
    return words[1] === 'test' ? ['test'] : words[1] === 'run' ? [words[2]!] : []
  })
  expect(used.length).toBeGreaterThan(10)
  for (const name of used) expect(scripts).toHaveProperty(name)
})

const served = commands
  .filter(({ words }) => words.includes('p2r-kernels') && words.includes('--base-url'))
  .map(({ document, words }) => ({ document, args: words.slice(words.indexOf('p2r-kernels') + 1) }))

test('commands that ask a server were found', () => {
  expect(served.length).toBeGreaterThan(1)
})

test.each(served)('$document: p2r-kernels $args', async ({ args }) => {
  const [redirect, main] = ['test/docs/redirect.mjs', 'dist/lib/cli/main.js']
  const { stdout } = await run(
    process.execPath,
    ['--import', join(root, redirect), join(root, main), ...args],
    { cwd: join(folder, 'files'), env: environment },
  )
  expect(stdout.length).toBeGreaterThan(0)
})
