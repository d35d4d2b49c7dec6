// The miniature of examples/mini-qwen: a Qwen3-VL of random weights that learns both roles.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Device, LocalPolicy, openDevice, type Qwen3VL } from 'p2r-kernels'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { loadDigits } from '../dist/examples/mini-p2r/digits.js'
import { Rng } from '../dist/examples/mini-p2r/rng.js'
import { Canvases, CELL, LATTICE, OVERVIEW } from '../dist/examples/mini-p2r/scene.js'
import { boxIn, cellsOf, look, mergedOf } from '../dist/examples/mini-qwen/batch.js'
import { answerAll, answerIn, scoresOf } from '../dist/examples/mini-qwen/evaluate.js'
import { loadModel, writeModel } from '../dist/examples/mini-qwen/model.js'
import { Sampler } from '../dist/examples/mini-qwen/sampler.js'
import { SETTINGS, Trainer } from '../dist/examples/mini-qwen/train.js'
import {
  answerTokens,
  boxTokens,
  imageTokens,
  MAX_TOKENS,
  questionText,
  questionTokens,
  TOKENIZER,
  textOf,
} from '../dist/examples/mini-qwen/vocabulary.js'

let folder: string
let device: Device
let canvases: Canvases

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'mini-qwen-'))
  device = openDevice('cpu')
  canvases = new Canvases(loadDigits('test'), 2, 2)
  await writeModel(folder, device, 0)
})
afterAll(() => {
  device.dispose()
  rmSync(folder, { recursive: true })
})

test('boxes and answers are texts that the library reads', () => {
  expect(textOf(boxTokens(33))).toBe('[{"bbox_2d": [31.25, 31.25, 62.5, 62.5], "label": "digit"}]')
  for (let cell = 0; cell < LATTICE ** 2; cell++)
    expect(boxIn(boxTokens(cell))).toEqual(cellsOf(cell))
  for (let digit = 0; digit < 10; digit++) expect(answerIn(answerTokens(digit))).toBe(String(digit))
  // An inverted box is none.
  const [open, left, top, right, ...rest] = boxTokens(5) as [number, number, number, number]
  expect(boxIn([open, right, top, left, ...rest])).toBeUndefined()
})

test('a rollout is what a LocalPolicy says to the image and the question', async () => {
  using model = await loadModel(folder, device)
  using sampler = new Sampler(model, 4096)
  const policy = new LocalPolicy(model, { tokenizer: TOKENIZER })
  const views = [{ canvas: 1 }, { canvas: 1, cells: cellsOf(7) }] as const
  for (const role of ['perceiver', 'reasoner'] as const) {
    const [view, side, pixels] =
      role === 'perceiver'
        ? ([views[0], OVERVIEW, canvases.overview(1).pixels] as const)
        : ([views[1], CELL, canvases.crop(1, 7)] as const)
    const vision = look(device, canvases, [view])
    using image = device.tensor(pixels, [side, side, 3], 'u8')
    for (const colour of [0, 2]) {
      const [[own]] = (await sampler.rollouts(
        role,
        vision,
        [{ image: 0, colour, temperatures: [0] }],
        new Rng(0),
      )) as [[number[]]]
      const [said] = await policy.generate({
        role,
        system: '',
        prompt: questionText(role, colour),
        images: [image],
        maxTokens: MAX_TOKENS[role],
        temperature: 0,
      })
      expect(said!.promptTokens).toEqual([
        ...imageTokens(mergedOf(vision.gridThw[0]!)),
        ...questionTokens(role, colour),
      ])
      expect(said!.tokens).toEqual(own)
      expect(said!.text).toBe(textOf(own))
    }
    vision.pixelValues.dispose()
  }
})

/** A few steps of both kinds: the losses, the rewards and what one of the weights became. */
async function trained(): Promise<{ losses: number[]; rewards: number[]; weight: Float32Array }> {
  using model: Qwen3VL = await loadModel(folder, device)
  using trainer = new Trainer(model, canvases, canvases, 0)
  const warm = { ...SETTINGS.warmStart, steps: 12, rampSteps: 5, canvases: 2, crops: 4 }
  const losses: number[] = []
  for await (const { boxLoss, answerLoss, detectionLoss } of trainer.warmStart(warm))
    losses.push(boxLoss + answerLoss + detectionLoss)
  const rewards: number[] = []
  const policy = { ...SETTINGS.policy, updates: 1, canvases: 2, group: 4, temperature: 1 }
  const before = await model.parameters().get('model.visual.merger.linear_fc2.weight')!.toFloat32()
  for await (const { reward, reasonerReward, faults } of trainer.policy(policy))
    rewards.push(reward, reasonerReward, faults)
  const weight = await model.parameters().get('model.visual.merger.linear_fc2.weight')!.toFloat32()
  expect(weight).not.toEqual(before)
  const { accuracy, hit, reasoner } = scoresOf(await answerAll(model, trainer.sampler, canvases))
  return { losses, rewards: [...rewards, accuracy, hit, reasoner], weight }
}

test('a few steps lower the losses, and depend on the seed alone', async () => {
  const first = await trained()
  expect(first.losses.length).toBe(12)
  expect(first.losses.at(-1)).toBeLessThan(0.85 * first.losses[0]!)
  for (const reward of first.rewards) {
    expect(reward).toBeGreaterThanOrEqual(0)
    expect(reward).toBeLessThanOrEqual(1)
  }
  expect(await trained()).toEqual(first)
})
