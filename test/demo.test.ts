// The miniature's command line, its answers to one image, and the page that a run leaves.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type Device, loadTensors, openDevice, saveTensors, scopeAsync } from 'p2r-kernels'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { evidenceOf } from '../dist/examples/mini-p2r/batch.js'
import { loadDigits } from '../dist/examples/mini-p2r/digits.js'
import { type Answered, answerAll, type System } from '../dist/examples/mini-p2r/evaluate.js'
import { page } from '../dist/examples/mini-p2r/page.js'
import { exampleSvg, imagesOf, percent, saveCanvas } from '../dist/examples/mini-p2r/pictures.js'
import { Perceiver, Reasoner } from '../dist/examples/mini-p2r/policy.js'
import { exampleOf, questionText, type Run, table } from '../dist/examples/mini-p2r/report.js'
import { Canvases, LATTICE, QUESTIONS } from '../dist/examples/mini-p2r/scene.js'
import { SETTINGS, schedule } from '../dist/examples/mini-p2r/train.js'
import { copyParams } from '../dist/examples/mini-p2r/vit.js'

const main = fileURLToPath(new URL('../dist/examples/mini-p2r/main.js', import.meta.url))
const golden = fileURLToPath(new URL('./golden/mini_p2r.safetensors', import.meta.url))
let folder: string
let device: Device
let system: System
let canvases: Canvases
let answered: Answered[]

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'p2r-demo-'))
  device = openDevice('cpu')
  canvases = new Canvases(loadDigits('test'), 2, 8)
  system = { device, perceiver: new Perceiver(device, 0), reasoner: new Reasoner(device, 0) }
  // Stored in bf16; the demo's own weights are f32.
  const stored = await loadTensors(golden, device)
  const weights = Object.fromEntries(
    Object.entries(stored).map(([name, tensor]) => [name, tensor.cast('f32')]),
  )
  await saveTensors(join(folder, 'weights.safetensors'), weights)
  for (const role of ['perceiver', 'reasoner'] as const) {
    const named = Object.keys(system[role].params)
    copyParams(
      system[role].params,
      Object.fromEntries(named.map((name) => [name, weights[`${role}.${name}`]!])),
    )
  }
  answered = await answerAll(system, canvases)
})
afterAll(() => {
  device.dispose()
  rmSync(folder, { recursive: true })
})

function demo(...args: string[]) {
  const env = { ...process.env, P2R_DEVICE: 'cpu', NO_COLOR: '1' }
  const { status, stdout, stderr } = spawnSync(process.execPath, [main, ...args], {
    cwd: folder,
    env,
    encoding: 'utf8',
  })
  return { code: status, out: stdout, err: stderr }
}

test('the command line explains itself and refuses what it does not understand', () => {
  const help = demo('--help')
  expect(help).toMatchObject({ code: 0, err: '' })
  for (const option of ['--seed', '--device', '--steps', '--split', '--image', '--out'])
    expect(help.out).toContain(option)
  const refused: [string[], RegExp][] = [
    [['--sede', '1'], /^mini-p2r: unknown option '--sede'\n\(Did you mean --seed\?\)/],
    [['--steps', '-1'], /--steps <n>' argument '-1' is invalid.*at least 0/],
    [['--image', 'a.png', '--steps', '5'], /'--image <file>' cannot be used with .*'--steps <n>'/],
    // What npm passes on where the -- before options is missing.
    [['7'], /too many arguments[\s\S]*npm needs the -- before/],
  ]
  for (const [args, message] of refused)
    expect(demo(...args), args.join(' ')).toMatchObject({
      code: 2,
      out: '',
      err: expect.stringMatching(message),
    })
  expect(existsSync(join(folder, 'out'))).toBe(false)
})

test('--image answers a picture as the evaluation does, says how sure it is and what it knows', async () => {
  await saveCanvas(device, canvases, 0, join(folder, 'canvas.png'))
  const { code, out, err } = demo('--image', 'canvas.png', '--out', '.')
  expect({ code, err }).toEqual({ code: 0, err: '' })
  const pattern =
    /^(Which .*\?) (\d) \((over |under )?(\d+) % sure\), seen in row (\d+), column (\d+) \(.*\d+ % sure\)$/gm
  const lines = [...out.matchAll(pattern)]
  expect(lines.map(([, question]) => question)).toEqual([0, 1, 2].map(questionText))
  for (const [i, [, , answer, , sure, row, column]] of lines.entries()) {
    const expected = answered[i]!
    expect([Number(answer), Number(row) * LATTICE + Number(column)]).toEqual([
      expected.answer,
      expected.cell,
    ])
    // The overview of a file is resampled with intermediate rounding, that of a scene is not.
    expect(Math.abs(Number(sure) / 100 - expected.answerProbability)).toBeLessThan(0.05)
  }
  expect(out).toMatch(/knows digits of this kind alone/)
  expect(existsSync(join(folder, 'annotated.png'))).toBe(true)

  mkdirSync(join(folder, 'empty'))
  expect(demo('--image', 'canvas.png', '--out', 'empty')).toMatchObject({
    code: 1,
    err: expect.stringMatching(/^mini-p2r: There are no trained weights in empty/),
  })
})

test('the probability of an answer is the largest of ten that sum to 1', async () => {
  const { question, cell, answer, answerProbability } = answered[0]!
  const probabilities = await scopeAsync(async () => {
    const { reasoner } = system
    const read = reasoner.read(evidenceOf(device, canvases, [question], [cell]), [question.colour])
    const all = Int32Array.from({ length: 10 }, (_, i) => i)
    const { logProbs } = reasoner.score(
      read,
      all.map(() => 0),
      all,
      1,
    )
    return Array.from(await logProbs.toFloat32(), Math.exp)
  })
  expect(probabilities.reduce((sum, p) => sum + p)).toBeCloseTo(1, 5)
  expect(Math.max(...probabilities)).toBe(probabilities[answer])
  expect(answerProbability).toBeCloseTo(probabilities[answer]!, 5)
  for (const { cellProbability } of answered) {
    expect(cellProbability).toBeGreaterThan(1 / LATTICE ** 2)
    expect(cellProbability).toBeLessThanOrEqual(1)
  }
})

test('a rounded probability never claims certainty', () => {
  expect([1, 0.995, 0.99, 0.5, 0.004].map(percent)).toEqual([
    'over 99 %',
    'over 99 %',
    '99 %',
    '50 %',
    'under 1 %',
  ])
})

test('few policy updates shorten the warm start, none that of the Reasoner alone', () => {
  const { warmStart, firstLook } = SETTINGS
  const lengths = (updates: number) => schedule(updates).warmStart.map((phase) => phase.updates)
  expect(schedule(0).policy).toEqual([])
  expect(lengths(0)).toEqual([warmStart.perceiver, firstLook * warmStart.reasoner])
  const full = [warmStart.perceiver, warmStart.reasoner]
  expect(lengths(SETTINGS.updates)).toEqual(full)
  expect(lengths(SETTINGS.updates / 2)).toEqual(full.map((n) => n / 2))
})

/** A run of eight examples, one of which has a wrong box. */
function exampleRun(): Run {
  const examples = Array.from({ length: 8 }, (_, i) =>
    exampleOf(answered[QUESTIONS * i + (i % QUESTIONS)]!),
  )
  const missed = { ...examples[1]!, hit: false, trueCell: 5, cell: 100 }
  const scores = (accuracy: number) => ({ accuracy, hit: 0.5, reasoner: 0.75 })
  return {
    seed: 3,
    device: { ...device.info, name: 'a <processor>' },
    split: 'test',
    questions: 24,
    steps: 20,
    stopped: false,
    seconds: 12.3,
    backbone: scores(0.125),
    trained: scores(0.375),
    phases: [{ kind: 'PRA-GRPO', role: 'perceiver', round: 1, updates: 20, seconds: 1 }],
    curve: [
      { update: 0, ...scores(0.125) },
      { update: 20, ...scores(0.375) },
    ],
    examples: [examples[0]!, missed, ...examples.slice(2)],
    settings: {},
  }
}

const requests = /<script|\bsrc=|@import|url\(|href="(?!data:)/

test('the page shows scores, learning curve and eight examples, and requests nothing', async () => {
  const run = exampleRun()
  const images = await Promise.all(run.examples.map((one) => imagesOf(device, canvases, one)))
  const html = await page(run, images)
  expect(html).not.toMatch(requests)
  expect(html.match(/<article/g)).toHaveLength(8)
  // A picture per example, and the curve.
  expect(html.match(/<svg/g)).toHaveLength(9)
  expect(html.match(/stroke-dasharray="0.5/g)).toHaveLength(
    run.examples.filter(({ hit }) => !hit).length,
  )
  expect(html).toContain('a &lt;processor&gt;')
  expect(html).toContain('20 policy updates, where a full run makes 1260')
  expect(html).toContain('<td>0.125</td><td>0.375</td>')
  expect(html).not.toMatch(/NaN|undefined/)
  // Every custom property that is used is set, in both colour schemes.
  const [light, dark] = html.split('@media (prefers-color-scheme: dark)') as [string, string]
  for (const [, name] of html.matchAll(/var\((--[\w-]+)\)/g)) {
    expect(light).toContain(`${name}:`)
    expect(dark).toContain(`${name}:`)
  }

  const picture = exampleSvg(run.examples[0]!, images[0]!)
  expect(picture.length).toBeLessThan(60_000)
  expect(picture).not.toMatch(requests)
  expect(picture).toContain(run.examples[0]!.question)
})

test('the page of a backbone alone and that of a stopped run say so', async () => {
  const { trained, ...rest } = exampleRun()
  const alone: Run = { ...rest, steps: 0, curve: [], examples: [] }
  const html = await page(alone, [])
  expect(html).toContain('A backbone alone')
  expect(html).toContain('no policy updates, and so no curve')
  expect(html).not.toContain('P2R</th>')
  expect(table(alone)).not.toContain('P2R')
  expect(table({ ...alone, steps: 20 })).toMatch(/backbone +P2R[\s\S]*0\.125 +-/)

  const stopped = await page({ ...rest, stopped: true, phases: [], curve: [], examples: [] }, [])
  expect(stopped).toContain('stopped early')
  expect(stopped).toContain('0 policy updates, where a full run makes 1260')
  expect(stopped).toContain('stopped before the curve had two points')
  expect(stopped).toContain('<td>0.125</td><td>–</td>')
  expect(stopped).not.toContain('<article')
})
