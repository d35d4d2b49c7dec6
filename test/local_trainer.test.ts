import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  LocalTrainer,
  type LocalTrainerOptions,
  loadTensors,
  openDevice,
  Qwen3VL,
  type Sample,
  type Tensor,
} from 'p2r-kernels'
import { afterAll, expect, test } from 'vitest'
import type { RolloutBatch } from '../lib/p2r/rollouts.js'
import { microBatches } from '../lib/train/micro_batches.js'
import { readStored, writeModel } from './golden_model.js'
import { relativeL2 } from './harness.js'
import { writeTokenizer } from './tiny_tokenizer.js'

const root = mkdtempSync(join(tmpdir(), 'local-trainer-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
const device = openDevice('cpu')
afterAll(() => device.dispose())
const folder = writeModel(join(root, 'model'), 'm1_d32_gqa2_tied', { shards: 2 })
writeTokenizer(folder)

let calls = 0
const base: LocalTrainerOptions = {
  groupSize: 4,
  lr: 1e-3,
  maxTokens: { perceiver: 6, reasoner: 6 },
  evidence: { maxPixels: 4096, minPixels: 1024 },
  // A tiny model answers nothing right: every other answer counts as right, an even number of them a step.
  verifier: async () => calls++ % 2 === 0,
}
const samples: Sample[] = [0, 1].map((i) => ({
  image: device.tensor(
    Uint8Array.from({ length: 32 * 48 * 3 }, (_, at) => (at * (7 + i)) % 256),
    [32, 48, 3],
  ),
  question: `What is it, ${i}?`,
  answerForm: 'free_form',
  truth: 'a',
}))

function load(options: LocalTrainerOptions = {}): Promise<LocalTrainer> {
  calls = 0
  return LocalTrainer.load(folder, device, { ...base, ...options })
}

async function weightsOf({ model }: LocalTrainer): Promise<Record<string, Float32Array>> {
  const all: Record<string, Float32Array> = {}
  for (const [name, weight] of model.parameters()) all[name] = await weight.toFloat32()
  return all
}

test.each(['f32', 'bf16'] as const)(
  'on-policy to the bit, and the weights change, in %s',
  async (dtype) => {
    using trainer = await load({ dtype })
    const before = await weightsOf(trainer)
    expect(trainer.role).toBe('perceiver')
    for (const role of ['perceiver', 'reasoner'] as const) {
      const { roles, applied, gradNorm } = await trainer.step(samples)
      expect(roles.map((one) => one.role)).toEqual([role])
      const [metrics] = roles
      expect(metrics!.errors).toBe(0)
      expect(metrics!.samplerDifference).toBe(0)
      expect(metrics!.ratioMean).toBe(1)
      expect(metrics!.approxKl).toBe(0)
      // Each is the first step of its phase, whose reference is the model itself.
      expect(metrics!.kl).toBe(0)
      expect(metrics!.correction).toMatchObject({ k1: 0, k3: 0 })
      expect(applied).toBe(true)
      expect(gradNorm).toBeGreaterThan(0)
    }
    expect(trainer.steps).toBe(2)
    expect(await weightsOf(trainer)).not.toEqual(before)
  },
)

test('a step in micro-batches equals the whole', async () => {
  const states: Record<string, Tensor>[] = []
  for (const microBatchTokens of [16_384, 1]) {
    using trainer = await load({ dtype: 'f32', microBatchTokens })
    const { roles, gradNorm } = await trainer.step(samples)
    expect(roles[0]!.microBatches).toBe(microBatchTokens === 1 ? 8 : 1)
    expect(gradNorm).toBeGreaterThan(0)
    const path = join(root, `pieces-${microBatchTokens}.safetensors`)
    await trainer.saveState(path)
    states.push(await loadTensors(path, device, { only: (name) => name.startsWith('moments.') }))
  }
  // After one step the first moments are a tenth of the gradients.
  for (const [name, moments] of Object.entries(states[0]!)) {
    const [whole, pieces] = await Promise.all([moments.read(), states[1]![name]!.read()])
    expect(relativeL2(pieces as Float32Array, whole as Float32Array), name).toBeLessThan(2e-4)
  }
})

test.each([
  ['all weights', {}],
  ['a low-rank change', { lora: { rank: 2, alpha: 4 }, reference: 'start' }],
  ['both roles at once', { joint: true, freezeTower: true, decay: 'cosine', steps: 9, warmup: 1 }],
] as [string, LocalTrainerOptions][])(
  'a run that is resumed has the bits of one that is not: %s',
  async (name, options) => {
    using whole = await load(options)
    for (let i = 0; i < 3; i++) await whole.step(samples)
    const path = join(root, `${name}.safetensors`)
    {
      using first = await load(options)
      await first.step(samples)
      await first.saveState(path)
    }
    using resumed = await load({ ...options, resume: path })
    expect(resumed.steps).toBe(1)
    for (let i = 0; i < 2; i++) await resumed.step(samples)
    expect(await weightsOf(resumed)).toEqual(await weightsOf(whole))
    await expect(load({ ...options, seed: 1, resume: path })).rejects.toThrow(/seed 0/)
  },
)

test('weights are saved as the source has them', async () => {
  using trainer = await load()
  await trainer.step(samples)
  const out = join(root, 'saved')
  await trainer.save(out)
  expect(readdirSync(out).sort()).toEqual(readdirSync(folder).sort())
  for (const file of readdirSync(folder)) {
    if (!file.endsWith('.safetensors')) {
      expect(readFileSync(join(out, file)), file).toEqual(readFileSync(join(folder, file)))
      continue
    }
    const [own, source] = [out, folder].map((at) => readStored(readFileSync(join(at, file))))
    expect(own!.header).toEqual(source!.header)
    expect(own!.data).not.toEqual(source!.data)
  }
  using again = await Qwen3VL.load(out, device)
  for (const [name, weight] of trainer.model.parameters())
    expect(await again.parameters().get(name)!.read(), name).toEqual(await weight.read())
  await expect(trainer.save(folder)).rejects.toThrow(/was loaded from/)
})

test.each([
  ['rewards that are NaN', { verifier: async () => Number.NaN as unknown as boolean }],
  [
    'a reward that fails',
    {
      verifier: async () => {
        throw new Error('no')
      },
    },
  ],
] as [string, LocalTrainerOptions][])('%s never reach the weights', async (_, options) => {
  using trainer = await load({ ...options, schedule: { perceiver: 0, reasoner: 1 } })
  const before = await weightsOf(trainer)
  const { roles, applied } = await trainer.step(samples)
  expect(roles[0]!.errors).toBe(8)
  expect(applied).toBe(false)
  expect(await weightsOf(trainer)).toEqual(before)
})

test('equal rewards and no other term leave weights and moments as they were', async () => {
  using trainer = await load({
    schedule: { perceiver: 0, reasoner: 1 },
    verifier: async () => true,
    loss: { klCoef: 0 },
  })
  const path = join(root, 'no-signal.safetensors')
  await trainer.saveState(path)
  const [before, state] = [await weightsOf(trainer), readStored(readFileSync(path)).data]
  const { applied, gradNorm, roles } = await trainer.step(samples)
  expect({ applied, gradNorm, errors: roles[0]!.errors }).toEqual({
    applied: false,
    gradNorm: 0,
    errors: 0,
  })
  expect(await weightsOf(trainer)).toEqual(before)
  await trainer.saveState(path)
  expect(Buffer.compare(readStored(readFileSync(path)).data, state)).toBe(0)
})

test('a gradient that is not finite leaves weights and moments as they were', async () => {
  // The KL term is 0 in a phase's first step; in its second one its gradient leaves f32's range.
  using trainer = await load({
    schedule: { perceiver: 2, reasoner: 1 },
    loss: { klCoef: 3e38, klClamp: false },
  })
  expect(await trainer.step(samples)).toMatchObject({ applied: true })
  const [before, path] = [await weightsOf(trainer), join(root, 'finite.safetensors')]
  await trainer.saveState(path)
  const { applied, gradNorm, roles } = await trainer.step(samples)
  expect(roles[0]!.errors).toBe(0)
  expect(Number.isFinite(gradNorm)).toBe(false)
  expect(applied).toBe(false)
  expect(await weightsOf(trainer)).toEqual(before)
  const after = join(root, 'not-finite.safetensors')
  await trainer.saveState(after)
  const [own, other] = [path, after].map((at) => readStored(readFileSync(at)))
  expect(other!.header).toEqual(own!.header)
  expect(Buffer.compare(other!.data, own!.data)).toBe(0)
})

test('completions that are empty, and failed ones, are in no pass', () => {
  const request = { promptTokens: [5, 6, 7], images: [] }
  const item = (tokens: number[], error?: Error) => ({
    request,
    completion: { text: '', tokens },
    ...(error && { error }),
  })
  const of = (...items: object[]) => microBatches({ items } as unknown as RolloutBatch, 7, 'test')
  const kept = [item([1, 2]), item([3]), item([4, 5])]
  const [a, b, c] = kept as [object, object, object]
  const failed = item([9], new Error('no'))
  const made = of(item([]), a, failed, b, item([]), c, item([]))
  expect(made).toEqual(of(a, b, c))
  expect(made.map(({ from, to }) => [from, to])).toEqual([
    [0, 3],
    [3, 5],
  ])
  expect(of(item([]), failed)).toEqual([])
})

test('two threads give the bits of one', async () => {
  const made = []
  for (const threads of [1, 2]) {
    using own = openDevice('cpu', { threads })
    calls = 0
    const images = samples.map(({ image }) => image.to(own))
    using trainer = await LocalTrainer.load(folder, own, base)
    for (let i = 0; i < 2; i++)
      expect(
        await trainer.step(samples.map((sample, at) => ({ ...sample, image: images[at]! }))),
      ).toMatchObject({ applied: true })
    made.push(await weightsOf(trainer))
  }
  expect(made[1]).toEqual(made[0])
})

test('wrong options are refused before a model is loaded', async () => {
  const bad: [LocalTrainerOptions, RegExp][] = [
    [{ lr: -1 }, /lr/],
    [{ decay: 'cosine' }, /steps/],
    [{ lora: { rank: 0 } }, /rank/],
    [{ lora: { targets: ['nothing'] } }, /no weight is trained/],
    [{ joint: true, schedule: { perceiver: 1, reasoner: 1 } }, /schedule/],
    [{ loss: { entropyCoef: 0.1 } }, /entropyCoef/],
    [{ microBatchTokens: 0 }, /microBatchTokens/],
    [{ betas: [1, 0.9] }, /betas/],
    [{ grupSize: 4 } as LocalTrainerOptions, /groupSize/],
  ]
  for (const [options, message] of bad) await expect(load(options)).rejects.toThrow(message)
})
