import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { concat, type Device, type Grid, Qwen3VL, type Tensor } from 'p2r-kernels'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import {
  type GoldenModel,
  goldenModels,
  modelF32,
  modelHas,
  modelI32,
  modelJson,
  packedOf,
  visionOf,
  writeModel,
} from './golden_model.js'
import { expectRefusal, onEveryBackend, relativeL2 } from './harness.js'

const root = mkdtempSync(join(tmpdir(), 'qwen3-vl-backward-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
for (const name of goldenModels) writeModel(join(root, name), name)

/** The reference's loss is -Σ g · logProbs. */
const dLogProbsOf = (device: Device, name: GoldenModel): Tensor<'f32'> => {
  const g = modelF32(name, 'g').map((x) => -x)
  return device.tensor(g, [g.length])
}

interface Summary {
  l2: number
  proj: number
  hf_bf16: number
}

const median = (values: number[]): number => values.sort((a, b) => a - b)[values.length >> 1]!
/** Of a gradient, as the reference's meta.json has it. */
const projection = (x: Float32Array) => x.reduce((sum, v, j) => sum + v * Math.sin(1 + j), 0)
const norm = (x: Float32Array) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0))

onEveryBackend('Qwen3VL', (b) => {
  for (const name of goldenModels) {
    const meta = modelJson(name, 'meta.json')
    const summary: Record<string, Summary> = meta.grad_summary
    describe.each(['f32', 'bf16'] as const)(`golden gradients of ${name} in %s`, (dtype) => {
      let model: Qwen3VL
      beforeAll(async () => {
        model = await Qwen3VL.load(join(root, name), b.device, { dtype })
      })
      afterAll(() => model.dispose())

      test.each(['none', 'block'] as const)('checkpoint %s', async (checkpoint) => {
        const packed = packedOf(b.device, name)
        const made = model.backward({
          ...packed,
          dLogProbs: dLogProbsOf(b.device, name),
          checkpoint,
          inputs: true,
        })
        const worst = median(Object.values(summary).map((s) => s.hf_bf16))
        const gate = (weight: string) =>
          dtype === 'f32' ? 5e-5 : 2 * Math.max(summary[weight]?.hf_bf16 ?? 0, worst)
        expect(Object.keys(made.gradients).sort()).toEqual([...model.parameters().keys()].sort())
        expect(Object.keys(made.gradients).sort()).toEqual(
          Object.keys(summary)
            .filter((weight) => weight in made.gradients)
            .sort(),
        )
        for (const [weight, gradient] of Object.entries(made.gradients)) {
          expect(gradient.shape, weight).toEqual(model.parameters().get(weight)!.shape)
          const values = await gradient.read()
          if (modelHas(name, `grad.${weight}`))
            expect(relativeL2(values, modelF32(name, `grad.${weight}`)), weight).toBeLessThan(
              gate(weight),
            )
          else {
            const rows: number[] = meta.tensors[`grad_rows.${weight}`].rows
            const width = values.length / gradient.shape[0]!
            const some = Float32Array.from(
              rows.flatMap((row) => [...values.subarray(row * width, (row + 1) * width)]),
            )
            expect(relativeL2(some, modelF32(name, `grad_rows.${weight}`)), weight).toBeLessThan(
              gate(weight),
            )
          }
          const { l2, proj } = summary[weight]!
          if (dtype === 'f32') {
            expect(Math.abs(projection(values) - proj), weight).toBeLessThanOrEqual(5e-5 * l2)
            expect(Math.abs(norm(values) - l2), weight).toBeLessThanOrEqual(5e-5 * l2)
          }
        }
        const dInputs = await made.dInputs!.toFloat32()
        expect(relativeL2(dInputs, modelF32(name, 'grad_inputs_embeds'))).toBeLessThan(
          gate('inputs'),
        )
        made.dispose()
      })
    })
  }

  describe('passes', () => {
    let model: Qwen3VL
    beforeAll(async () => {
      model = await Qwen3VL.load(join(root, 'm1_d32_gqa2_tied'), b.device, { dtype: 'f32' })
    })
    afterAll(() => model.dispose())

    const norms = 'model.language_model.norm.weight'
    const tensor = (values: readonly number[]) => b.device.tensor([...values], [values.length])
    const prompt = [5, 6, 7, 8, 9, 10, 11, 12]
    const completions = [[20, 21, 22], [30, 31], [], [40, 41, 42, 43]]
    const weights = [1, -2, 0.5, 0.3, 1, -0.2, 0.7, 0.1, 2]

    test('the record has the log-probabilities of logProbs, to the bit', async () => {
      const packed = packedOf(b.device, 'm1_d32_gqa2_tied')
      using expected = model.logProbs(packed)
      for (const checkpoint of ['none', 'block'] as const) {
        using record = model.record({ ...packed, checkpoint })
        expect(await record.logProbs.read()).toEqual(await expected.logProbs.read())
        expect(await record.entropy.read()).toEqual(await expected.entropy.read())
      }
      const targets = [40, 3, 3]
      using some = model.logProbs({ ...packed, targets })
      const all = await expected.logProbs.read()
      expect([...(await some.logProbs.read())]).toEqual(targets.map((t) => all[t]))
    })

    test('a shared prompt is as its copies, and both checkpoints are one', async () => {
      const bounds = [0, prompt.length]
      for (const c of completions) bounds.push(bounds.at(-1)! + c.length)
      const shared = {
        tokens: [...prompt, ...completions.flat()],
        cuSeqlens: bounds,
        prefixOf: [-1, 0, 0, 0, 0],
        targets: completions.flat().map((_, i) => prompt.length + i),
      }
      const tokens: number[] = []
      const cuSeqlens = [0]
      const targets: number[] = []
      for (const c of completions) {
        tokens.push(...prompt)
        for (const token of c) targets.push(tokens.push(token) - 1)
        cuSeqlens.push(tokens.length)
      }
      using one = model.record({ ...shared, inputs: true })
      using copies = model.record({ tokens, cuSeqlens, targets })
      expect(relativeL2(await one.logProbs.read(), await copies.logProbs.read())).toBeLessThan(1e-6)
      const d = { dLogProbs: tensor(weights), dEntropy: tensor(weights.map((w) => w / 3)) }
      using from = one.backward(d)
      using of = copies.backward(d)
      using again = model.backward({ ...shared, ...d, checkpoint: 'block' })
      for (const [name, gradient] of Object.entries(from.gradients)) {
        const values = await gradient.read()
        const expected = await of.gradients[name]!.read()
        // There are no images: the tower's are 0.
        if (name.startsWith('model.visual.')) expect(values, name).toEqual(expected)
        else expect(relativeL2(values, expected), name).toBeLessThan(5e-6)
        expect(values, name).toEqual(await again.gradients[name]!.read())
      }
      expect(from.dInputs!.shape).toEqual([shared.tokens.length, model.config.hiddenSize])
    })

    test('a shared prompt with images is as its copies', async () => {
      // Two images, of which each copy has its own pixels.
      const all = modelI32('m1_d32_gqa2_tied', 'input_ids')
      const from = modelI32('m1_d32_gqa2_tied', 'cu_seqlens')[2]!
      const shown = [...all.subarray(from, from + modelI32('m1_d32_gqa2_tied', 'prompt_lens')[2]!)]
      const { images } = visionOf(b.device, 'm1_d32_gqa2_tied', 'images', [2, 3])
      const { pixelValues, gridThw } = images!
      expect(gridThw).toHaveLength(2)
      const own = completions.filter(({ length }) => length > 0)
      const shared = { tokens: [...shown], cuSeqlens: [0, shown.length], targets: [] as number[] }
      const copies = { tokens: [] as number[], cuSeqlens: [0], targets: [] as number[] }
      for (const completion of own) {
        copies.tokens.push(...shown)
        for (const packed of [shared, copies]) {
          for (const token of completion) packed.targets.push(packed.tokens.push(token) - 1)
          packed.cuSeqlens.push(packed.tokens.length)
        }
      }
      const dLogProbs = tensor(weights)
      using one = model.record({ ...shared, images: images!, prefixOf: [-1, ...own.map(() => 0)] })
      using many = model.record({
        ...copies,
        images: {
          pixelValues: concat({ tensors: own.map(() => pixelValues) }),
          gridThw: own.flatMap(() => [...(gridThw as Grid[])]),
        },
      })
      expect(relativeL2(await one.logProbs.read(), await many.logProbs.read())).toBeLessThan(1e-6)
      using of = one.backward({ dLogProbs })
      using expected = many.backward({ dLogProbs })
      for (const [name, gradient] of Object.entries(of.gradients)) {
        const values = await gradient.read()
        expect(norm(values), name).toBeGreaterThan(0)
        expect(relativeL2(values, await expected.gradients[name]!.read()), name).toBeLessThan(1e-5)
      }
    })

    test('gradients are added to what is given, and only those that are trained are made', async () => {
      const a = { tokens: prompt, cuSeqlens: [0, prompt.length], dLogProbs: tensor(prompt) }
      using first = model.backward(a)
      const before = await first.gradients[norms]!.read()
      using second = model.backward({ ...a, into: first.gradients })
      expect(await first.gradients[norms]!.read()).toEqual(before.map((x) => 2 * x))
      for (const [name, gradient] of Object.entries(second.gradients))
        expect(await gradient.read(), name).toEqual(await first.gradients[name]!.read())
      const trainable = (name: string) => /layers\.2\.mlp\.(up|down)_proj/.test(name)
      using some = model.backward({ ...a, trainable })
      expect(Object.keys(some.gradients)).toHaveLength(2)
      for (const [name, gradient] of Object.entries(some.gradients))
        expect(
          relativeL2(
            await gradient.read(),
            (await second.gradients[name]!.read()).map((x) => x / 2),
          ),
          name,
        ).toBeLessThan(1e-6)
    })

    test('its loss falls along the gradient as the gradient says', async () => {
      const a = { tokens: prompt, cuSeqlens: [0, prompt.length] }
      const total = async () => {
        using out = model.logProbs(a)
        return (await out.logProbs.read()).reduce((sum, x) => sum + x, 0)
      }
      using made = model.backward({ ...a, dLogProbs: tensor(prompt.map(() => 1)) })
      const kept = new Map<string, Float32Array>()
      let slope = 0
      const gradients = new Map<string, Float32Array>()
      for (const [name, weight] of model.parameters()) {
        kept.set(name, await weight.toFloat32())
        gradients.set(name, await made.gradients[name]!.read())
        slope += gradients.get(name)!.reduce((sum, x) => sum + x * x, 0)
      }
      const move = (step: number) => {
        for (const [name, weight] of model.parameters())
          weight.write(kept.get(name)!.map((x, i) => x + step * gradients.get(name)![i]!))
      }
      const step = 0.005 / Math.sqrt(slope)
      move(step)
      const above = await total()
      move(-step)
      const below = await total()
      move(0)
      expect(Math.abs((above - below) / (2 * step) / slope - 1)).toBeLessThan(1e-2)
    })

    test('refuses what does not fit', () => {
      const a = { tokens: [5, 6, 7], cuSeqlens: [0, 2, 3] }
      const refused = (change: object, code: string, message: RegExp) =>
        expectRefusal(
          () => model.backward({ ...a, dLogProbs: tensor([1, 1, 1]), ...change } as never),
          code,
          'Qwen3VL',
          message,
        )
      refused({ prefixOf: [-1] }, 'ERR_VALUE', /one entry a sequence, 2, got 1/)
      refused({ prefixOf: [-1, 1] }, 'ERR_VALUE', /prefixOf\[1\] must be -1 or an earlier/)
      refused({ cuSeqlens: [0, 0, 3], prefixOf: [-1, 0] }, 'ERR_VALUE', /is empty/)
      refused({ targets: [3] }, 'ERR_VALUE', /targets\[0\] must be a place in tokens/)
      refused({ dLogProbs: tensor([1]) }, 'ERR_SHAPE', /dLogProbs must be \[3\], got \[1\]/)
      refused({ dLogProbs: undefined }, 'ERR_VALUE', /dLogProbs must be a Tensor/)
      refused({ checkpoint: 'blocks' }, 'ERR_VALUE', /checkpoint must be/)
      refused({ into: { [norms]: tensor([1]) } }, 'ERR_SHAPE', /into\['model/)
      refused({ into: { norm: tensor([1]) } }, 'ERR_VALUE', /unknown option 'into\.norm'/)
      refused({ trainable: true }, 'ERR_VALUE', /trainable must be a function/)
      refused({ checkpoints: 'none' }, 'ERR_VALUE', /did you mean 'checkpoint'/)
      using record = model.record(a)
      record.backward({ dLogProbs: tensor([1, 1, 1]) }).dispose()
      expectRefusal(
        () => record.backward({ dLogProbs: tensor([1, 1, 1]) }),
        'ERR_VALUE',
        'Qwen3VL',
        /used up/,
      )
    })
  })
})
