// The command with a model of its own, run as its users run it.
import { spawn } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { openDevice, saveImage } from 'p2r-kernels'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { writeModel } from './golden_model.js'
import { writeTokenizer } from './tiny_tokenizer.js'

const main = fileURLToPath(new URL('../dist/lib/cli/main.js', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'p2r-cli-local-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
beforeAll(async () => {
  writeTokenizer(writeModel(join(folder, 'tiny'), 'm1_d32_gqa2_tied'))
  using device = openDevice('cpu')
  const pixels = Uint8Array.from({ length: 64 * 96 * 3 }, (_, i) => (i * 7) % 256)
  await saveImage(device.tensor(pixels, [64, 96, 3], 'u8'), join(folder, 'a.png'))
})

function start(...args: string[]) {
  const env = { ...process.env, P2R_DEVICE: 'cpu', NO_COLOR: '1' }
  const child = spawn(process.execPath, [main, ...args], { cwd: folder, env })
  const shown = { out: '', err: '' }
  child.stdout.on('data', (text) => {
    shown.out += text
  })
  child.stderr.on('data', (text) => {
    shown.err += text
  })
  const ended = new Promise<{ code: number | null; out: string; err: string }>((resolve) => {
    child.on('close', (code) => resolve({ code, ...shown }))
  })
  return { child, shown, ended }
}
const run = (...args: string[]) => start(...args).ended
const question = 'What does the sign say?\n(A) Stop (B) Go'

test('answers with a checkpoint’s folder in place of a server', async () => {
  const args = ['answer', 'a.png', question, '--model', 'tiny', '--device', 'cpu', '--json']
  const { code, out, err } = await run(...args)
  // A random model has nothing to say, but both roles have said it.
  if (code === 0) {
    expect(JSON.parse(out)).toMatchObject({ hasEvidence: false, boxes: [] })
    expect(JSON.parse(out).reasoning.length).toBeGreaterThan(10)
  } else {
    expect(code).toBe(1)
    expect(err).toMatch(/there is no answer in the reasoner's output: ./)
  }
  expect((await run(...args)).out).toBe(out)
}, 60_000)

test('evaluates with it', async () => {
  const line = { image: 'a.png', text: question, label: 'A', category: 'x' }
  await writeFile(join(folder, 'data.jsonl'), `${JSON.stringify(line)}\n`)
  const { code, out, err } = await run('evaluate', 'data.jsonl', '--model', 'tiny')
  expect({ code, err: err.replace(/^The limit.*|.*cut off.*\n?/gm, '') }).toEqual({
    code: 0,
    err: '',
  })
  expect(out).toMatch(/x .*1/)
}, 60_000)

test('trains it, goes on where it stopped, and gives a checkpoint that answers', async () => {
  const line = { image: 'a.png', text: question, label: 'A', category: 'x' }
  await writeFile(join(folder, 'train.jsonl'), `${JSON.stringify(line)}\n`.repeat(2))
  const sizes = ['--max-tokens', '6', '--max-pixels', '16384', '--min-pixels', '4096']
  const train = (out: string, steps: string) =>
    run(
      ...['train', 'train.jsonl', '--model', 'tiny', '--out', out, '--steps', steps],
      ...['--batch', '1', '--group', '2', '--stages', 'alternating', '--lr', '1e-3', ...sizes],
      ...['--validate', 'train.jsonl', '--validate-every', '2'],
    )
  const lines = (out: string): { validation?: { questions: number } }[] =>
    readFileSync(join(folder, out, 'metrics.jsonl'), 'utf8')
      .trim()
      .split('\n')
      .map((text) => ({ ...JSON.parse(text), seconds: 0, tokensPerSecond: 0 }))
  const once = await train('once', '3')
  expect({ code: once.code, out: once.out.trim() }).toEqual({ code: 0, out: join('once', 'model') })
  // In two parts, of which the first ended during a validation: the same numbers to the last digit.
  expect((await train('parts', '2')).code).toBe(0)
  const metrics = join(folder, 'parts/metrics.jsonl')
  const ended = readFileSync(metrics, 'utf8').replace(/,"validation":\{[^}]*\}/, '')
  expect(ended).not.toContain('validation')
  await writeFile(metrics, ended)
  expect((await train('parts', '3')).err).toMatch(/Goes on after 2 steps/)
  expect(lines('parts')).toEqual(lines('once'))
  expect(lines('once')).toHaveLength(3)
  // Every second step is validated, and the last.
  expect(lines('once').map(({ validation }) => validation?.questions)).toEqual([undefined, 2, 2])
  const page = readFileSync(join(folder, 'once/index.html'), 'utf8')
  expect(page).toContain('<h1>Training of tiny</h1>')
  expect(page).toContain('3 of 3 steps')
  const curves = ['Reward', 'Validation', 'KL', 'Entropy', 'Length', 'Cut off', 'Faults', 'Speed']
  for (const title of curves) expect(page).toMatch(new RegExp(`aria-label="${title}: [^"]*\\d`))
  // The last step was the perceiver's: one question, whose options are shown as text.
  expect(page.match(/<article>/g)).toHaveLength(1)
  expect(page).toContain(question)
  expect(page).toMatch(/<img src="data:image\/jpeg;base64,/)
  // Nothing is requested, and nothing runs.
  expect(page).not.toMatch(/https?:|<script|<link rel="stylesheet/)
  const trained = (out: string) => readFileSync(join(folder, out, 'model/model.safetensors'))
  expect(trained('parts').equals(trained('once'))).toBe(true)
  const { code, err } = await run('evaluate', 'train.jsonl', '--model', join('once', 'model'))
  expect({ code, err }).toMatchObject({ code: 0 })
}, 120_000)

test('says what --model means, and what is missing', async () => {
  const { out } = await run('answer', '--help')
  expect(out.replaceAll(/\s+/g, ' ')).toContain(
    "with --base-url the served model (default: the only one); without, a checkpoint's folder, which is run here",
  )
  for (const [args, message] of [
    [
      ['answer', 'a.png', 'q'],
      /needs --base-url, where its server is, .* or --model, a checkpoint's folder/,
    ],
    [
      ['answer', 'a.png', 'q', '--model', 'nowhere'],
      /--model nowhere is not a checkpoint's folder/,
    ],
    [['serve', '--model', 'nowhere'], /nowhere is not a checkpoint's folder/],
    [['serve'], /required option '--model <folder>' not specified/],
    [['serve', '--model', 'tiny', '--port', '70000'], /It should be a port/],
  ] as const)
    expect(await run(...args)).toMatchObject({
      code: 2,
      out: '',
      err: expect.stringMatching(message),
    })
})

test('serves a checkpoint until it is told to stop', async () => {
  const { child, shown, ended } = start(
    ...['serve', '--model', 'tiny', '--port', '0', '--api-key', 'k', '--max-tokens', '5'],
  )
  await expect.poll(() => shown.err, { timeout: 30_000 }).toMatch(/Ctrl-C ends it/)
  const [, baseURL] = /tiny is served at (\S+), on/.exec(shown.err)!
  expect(baseURL).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/v1$/)
  const post = (authorization: string) =>
    fetch(`${baseURL}/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', authorization },
      body: JSON.stringify({ model: 'tiny', messages: [{ role: 'user', content: 'Where?' }] }),
    })
  expect((await post('Bearer x')).status).toBe(401)
  const answer = (await (await post('Bearer k')).json()) as { usage: Record<string, number> }
  expect(answer.usage.completion_tokens!).toBeLessThanOrEqual(5)
  child.kill('SIGTERM')
  expect(await ended).toMatchObject({ code: 0, out: '' })
}, 60_000)
