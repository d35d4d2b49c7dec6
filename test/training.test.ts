// What training rests on: whole steps against float64, learning, and the memory that a step takes.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { adamW, type Checkpoint, grpoStep, Qwen3VL, type Tensor } from 'p2r-kernels'
import { afterAll, describe, expect, test } from 'vitest'
import { modelI32, modelJson, visionOf, writeModel } from './golden_model.js'
import { onEveryBackend } from './harness.js'
import { textLogProbs, weightsOf } from './qwen3_vl_oracle.js'

const name = 'm1_d32_gqa2_tied'
const root = mkdtempSync(join(tmpdir(), 'training-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
const folder = writeModel(join(root, 'model'), name)

/** Numbers from -1 to 1 that depend on the place alone. */
const wave = (length: number, at: number): Float32Array =>
  Float32Array.from({ length }, (_, i) => Math.sin(12.9898 * (i + 1) + 78.233 * at))

/** Prompts and the completions after each, with their rows where each prompt is computed once. */
function groupsOf(prompts: readonly number[][], completions: readonly number[][][]) {
  const tokens: number[] = []
  const cuSeqlens = [0]
  const prefixOf: number[] = []
  const targets: number[] = []
  for (const [i, prompt] of prompts.entries()) {
    const prefix = prefixOf.push(-1) - 1
    cuSeqlens.push(tokens.push(...prompt))
    for (const completion of completions[i]!) {
      prefixOf.push(prefix)
      for (const token of completion) targets.push(tokens.push(token) - 1)
      cuSeqlens.push(tokens.length)
    }
  }
  return { tokens, cuSeqlens, prefixOf, targets }
}

const prompts = [
  [5, 6, 7, 8, 9],
  [300, 20, 21],
]
const completions = [
  [[20, 21, 22], [40], [60, 61, 62, 63]],
  [[7], [9, 9, 10], [1, 2]],
]
const rewards = [1, 0, 0.25, 0, 1, 1]
const groups = [0, 0, 0, 1, 1, 1]
const lossOptions = { clipLow: 0.2, clipHigh: 0.28, klCoef: 0.1 }
const bounds = [0]
for (const { length } of completions.flat()) bounds.push(bounds.at(-1)! + length)
const directions = [(j: number) => Math.sin(1 + j), (j: number) => Math.cos(3 * j)]

/** The loss of a GRPO step on these completions and its slopes along `directions`, in float64. */
function oracleOf(config: Qwen3VL['config'], weights: ReadonlyMap<string, Float64Array>) {
  const logProbs = (): number[] =>
    completions.flat().flatMap((completion, b) => {
      const prompt = prompts[groups[b]!]!
      const all = textLogProbs(config, weights, [...prompt, ...completion])
      return [...all.subarray(prompt.length - 1)]
    })
  const start = logProbs()
  // Off-policy, so that ratios are clipped on either side, none of them near the bounds, and the KL term is not 0.
  const old = Float32Array.from(start, (x, t) => x + [0.4, -0.4, 0.1, -0.1, 0][t % 5]!)
  const ref = Float32Array.from(start, (x, t) => x + 0.3 * Math.cos(3 * t))
  const advantages = rewards.map((reward, b) => {
    const own = rewards.filter((_, other) => groups[other] === groups[b])
    const mean = own.reduce((sum, r) => sum + r, 0) / own.length
    const square = own.reduce((sum, r) => sum + (r - mean) ** 2, 0)
    return (reward - mean) / (Math.sqrt(square / (own.length - 1)) + 1e-6)
  })
  const clipped = new Set<'low' | 'high'>()
  const lossNow = (): number => {
    const { clipLow, clipHigh, klCoef } = lossOptions
    let total = 0
    for (const [t, now] of logProbs().entries()) {
      const advantage = advantages[bounds.findIndex((end) => end > t) - 1]!
      const ratio = Math.exp(now - old[t]!)
      const held = Math.min(Math.max(ratio, 1 - clipLow), 1 + clipHigh)
      if (held * advantage < ratio * advantage) clipped.add(advantage < 0 ? 'low' : 'high')
      const apart = ref[t]! - now
      total -= Math.min(ratio * advantage, held * advantage)
      total += klCoef * (Math.exp(apart) - apart - 1)
    }
    return total / bounds.at(-1)!
  }
  const loss = lossNow()
  const slopes = new Map<string, number[]>()
  for (const [name, weight] of weights) {
    if (name.startsWith('model.visual.')) continue
    const original = weight.slice()
    const along = (direction: (j: number) => number): number => {
      const h = 1e-4 / Math.hypot(...Array.from(weight, (_, j) => direction(j)))
      const at = (steps: number): number => {
        for (let j = 0; j < weight.length; j++) weight[j] = original[j]! + steps * h * direction(j)
        return lossNow()
      }
      // Central differences of fourth order.
      const slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
      weight.set(original)
      return slope
    }
    slopes.set(name, directions.map(along))
  }
  return { old, ref, loss, slopes, clipped }
}
let oracle: ReturnType<typeof oracleOf> | undefined

onEveryBackend('training', (b) => {
  const tensor = (values: ArrayLike<number>): Tensor<'f32'> =>
    b.device.tensor(Float32Array.from(values), [values.length])

  test.each(['none', 'block'] as const)(
    'the gradients of a whole GRPO step are those of float64, checkpoint %s',
    async (checkpoint) => {
      using model = await Qwen3VL.load(folder, b.device, { dtype: 'f32' })
      oracle ??= oracleOf(model.config, await weightsOf(model))
      const { old, ref, loss, slopes, clipped } = oracle
      expect(clipped).toEqual(new Set(['low', 'high']))
      using record = model.record({ ...groupsOf(prompts, completions), checkpoint })
      using step = grpoStep({
        logProbs: record.logProbs,
        oldLogProbs: tensor(old),
        refLogProbs: tensor(ref),
        rewards: tensor(rewards),
        groups,
        cuSeqlens: bounds,
        ...lossOptions,
      })
      using made = record.backward({ dLogProbs: step.dLogProbs })
      expect(Math.abs((await step.loss.item()) - loss)).toBeLessThan(1e-5)
      expect(slopes.size).toBeGreaterThan(30)
      for (const [name, gradient] of Object.entries(made.gradients)) {
        const values = await gradient.read()
        const expected = slopes.get(name)
        // There are no images.
        if (!expected) {
          expect(values, name).toEqual(new Float32Array(values.length))
          continue
        }
        const norm = Math.hypot(...values)
        expect(norm, name).toBeGreaterThan(0)
        for (const [i, direction] of directions.entries()) {
          const own = values.reduce((sum, g, j) => sum + g * direction(j), 0)
          expect(Math.abs(own - expected[i]!), name).toBeLessThanOrEqual(5e-5 * norm)
        }
      }
    },
    60_000,
  )

  test('a tiny model learns 8 answers by heart', async () => {
    using model = await Qwen3VL.load(folder, b.device, { dtype: 'f32' })
    const asked = Array.from({ length: 8 }, (_, i) => [5, 6, 7, 100 + i])
    const answers = asked.map((_, i) => [[200 + 7 * i, 30 + i, (91 * i) % 400, 501]])
    const packed = groupsOf(asked, answers)
    const count = packed.targets.length
    const dLogProbs = tensor(new Float32Array(count).fill(-1 / count))
    const text = [...model.parameters()].filter(([name]) => !name.startsWith('model.visual.'))
    const params = text.map(([, weight]) => weight)
    const moments = params.map(({ size }) => b.device.zeros([2, size]))
    const trainable = (name: string) => !name.startsWith('model.visual.')
    const losses: number[] = []
    for (let step = 1; step <= 150 && !(losses.at(-1)! < 0.01); step++) {
      using record = model.record({ ...packed, trainable })
      using made = record.backward({ dLogProbs })
      const grads = text.map(([name]) => made.gradients[name]!)
      adamW({ params, grads, moments, step, lr: 3e-3, weightDecay: 0 })
      losses.push((await record.logProbs.read()).reduce((sum, x) => sum - x / count, 0))
    }
    expect(losses[0]).toBeGreaterThan(4)
    expect(losses.at(-1)).toBeLessThan(0.01)
    // And says them: each is what greedy decoding gives.
    const made = await model.generate({
      prompts: asked.map((tokens) => ({ tokens })),
      maxTokens: 4,
      temperature: 0,
    })
    expect(made.map(([only]) => [...only!.tokens])).toEqual(answers.map(([own]) => own))
  }, 60_000)

  describe('the memory of a step', () => {
    const config = modelJson(name, 'config.json')
    const tokens = 400
    const sequence = {
      tokens: Array.from({ length: tokens }, (_, t) => (t * 37) % 500),
      cuSeqlens: [0, tokens],
    }

    /** The sequences of one and of two images. */
    function shown() {
      const ends = modelI32(name, 'cu_seqlens')
      const rows = modelI32(name, 'input_ids').slice(ends[1]!, ends[3]!)
      const cuSeqlens = [0, ends[2]! - ends[1]!, ends[3]! - ends[1]!]
      return { tokens: [...rows], cuSeqlens, ...visionOf(b.device, name, 'images', [1, 3]) }
    }

    type Part = 'text' | 'vision'
    const parts = {
      text: { prefix: 'model.language_model.layers', depth: 'num_hidden_layers', layers: 3 },
      vision: { prefix: 'model.visual.blocks', depth: 'depth', layers: 3 },
    } as const

    /** A model of more layers: those of the reference again and again. */
    function deep(part: Part, layers: number): string {
      const { prefix, depth, layers: own } = parts[part]
      const copies: Record<string, string> = {}
      for (const weight of Object.keys(modelJson(name, 'meta.json').grad_summary))
        if (weight.startsWith(`${prefix}.0.`))
          for (let i = own; i < layers; i++) {
            const of = (layer: number) => weight.replace(`${prefix}.0.`, `${prefix}.${layer}.`)
            copies[of(i)] = of(i % own)
          }
      return writeModel(join(root, `deep-${part}-${layers}`), name, {
        copies,
        config: (json: Record<string, unknown>) => {
          json[`${part}_config`] = { ...config[`${part}_config`], [depth]: layers }
        },
      })
    }

    /** The most bytes that a step holds beside the model. Its one gradient is that of the first layer's norm. */
    async function peakOf(
      part: Part,
      layers: number,
      dtype: 'f32' | 'bf16',
      checkpoint: Checkpoint,
    ) {
      using model = await Qwen3VL.load(deep(part, layers), b.device, { dtype })
      const norm = part === 'text' ? 'layers.0.input_layernorm.weight' : 'blocks.0.norm1.weight'
      const trainable = (weight: string) => weight.endsWith(norm)
      const packed = part === 'text' ? sequence : shown()
      using dLogProbs = tensor(wave(packed.tokens.length, 1))
      await b.device.synchronize()
      b.device.resetPeak()
      const { liveBytes } = b.device.memory()
      using made = model.backward({ ...packed, dLogProbs, checkpoint, trainable })
      await Object.values(made.gradients)[0]!.read()
      return b.device.memory().peakBytes - liveBytes
    }

    describe.each([
      ['none', 'f32'],
      ['none', 'bf16'],
      ['block', 'f32'],
      ['block', 'bf16'],
    ] as const)('checkpoint %s in %s', (checkpoint, dtype) => {
      const size = dtype === 'f32' ? 4 : 2
      const ofSixMore = async (part: Part): Promise<number> =>
        (await peakOf(part, 9, dtype, checkpoint)) - (await peakOf(part, 3, dtype, checkpoint))

      test('each layer adds what docs/training.md says', async () => {
        const { hidden_size: h, intermediate_size: f, head_dim: d } = config.text_config
        const { num_attention_heads: heads, num_key_value_heads: kvHeads } = config.text_config
        const activations =
          size * (4 * h + 4 * (heads + kvHeads) * d + 2 * f) + 4 * (2 + 2 * heads + kvHeads)
        const token = checkpoint === 'none' ? activations : size * h
        expect(await ofSixMore('text')).toBe(6 * tokens * token)
      })

      test('each block of the tower does, too', async () => {
        const { hidden_size: h, intermediate_size: f, num_heads: heads } = config.vision_config
        const activations = size * (8 * h + f) + 4 * (4 + heads)
        const patch = checkpoint === 'none' ? activations : size * h
        const patches = shown().images!.pixelValues.shape[0]!
        expect(await ofSixMore('vision')).toBe(6 * patches * patch)
      })
    })
  })
})
