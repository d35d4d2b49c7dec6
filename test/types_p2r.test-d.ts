// The types of Perceive-to-Reason: compiled by vitest's typecheck and by
// `tsc -p test`, never run. A wrong type is a compile error; so is an expected error that does not
// occur.
import {
  type Answer,
  alternatingSettings,
  answer,
  collectEvidence,
  type Device,
  evaluate,
  functionPolicy,
  type GrpoBatch,
  type GrpoModel,
  type GrpoStep,
  grpoStep,
  type LossMetrics,
  normalizePatches,
  OpenAIPolicy,
  Perceiver,
  type Perception,
  type Policy,
  type PraGrpo,
  type PraGrpoSettings,
  paperSettings,
  type Question,
  type Reasoner,
  type Reasoning,
  type RolloutBatch,
  type Tensor,
  type TrainedModel,
  type VisionTower,
} from 'p2r-kernels'
import { expectTypeOf, test } from 'vitest'

declare const device: Device
declare const image: Tensor<'u8'>
declare const f32: Tensor<'f32'>
declare const bf16: Tensor<'bf16'>
declare const i32: Tensor<'i32'>
declare const unknown: Tensor
declare const policy: Policy
declare const batch: GrpoBatch
declare const rollouts: RolloutBatch
declare const trainer: PraGrpo
declare const tower: VisionTower
const gridThw = [[1, 4, 4]] as const
declare const model: GrpoModel
declare const trained: TrainedModel
declare const some: boolean
declare const evidence: ReturnType<typeof collectEvidence>
declare const perceiver: Perceiver
declare const reasoner: Reasoner
declare const questions: Numbered[]

interface Numbered extends Question {
  id: number
}

test('gradients follow the input of a step', () => {
  const ofLogProbs = grpoStep({ ...batch, logProbs: f32 })
  expectTypeOf(ofLogProbs.dLogProbs).toEqualTypeOf<Tensor<'f32'>>()
  expectTypeOf(ofLogProbs.advantages).toEqualTypeOf<Tensor<'f32'>>()
  expectTypeOf(ofLogProbs.metrics()).toEqualTypeOf<Promise<LossMetrics>>()
  expectTypeOf(ofLogProbs).not.toHaveProperty('dLogits')
  expectTypeOf(ofLogProbs).not.toHaveProperty('dHidden')

  const ofLogits = grpoStep({ ...batch, logits: bf16, targets: i32, temperature: 0.5 })
  expectTypeOf(ofLogits.dLogits).toEqualTypeOf<Tensor<'bf16'>>()
  expectTypeOf(ofLogits).not.toHaveProperty('dLogProbs')

  const ofHead = grpoStep({ ...batch, hidden: bf16, weight: bf16, targets: i32 })
  expectTypeOf(ofHead.dHidden).toEqualTypeOf<Tensor<'bf16'>>()
  expectTypeOf(ofHead.dWeight).toEqualTypeOf<Tensor<'f32'>>()
  expectTypeOf(ofHead).not.toHaveProperty('dBias')

  const ofBiasedHead = grpoStep({ ...batch, hidden: bf16, weight: bf16, bias: f32, targets: i32 })
  expectTypeOf(ofBiasedHead.dHidden).toEqualTypeOf<Tensor<'bf16'>>()
  expectTypeOf(ofBiasedHead.dBias).toEqualTypeOf<Tensor<'f32'>>()

  expectTypeOf(grpoStep({ ...batch, ...model })).toEqualTypeOf<GrpoStep>()
  expectTypeOf(ofBiasedHead).toExtend<GrpoStep>()
  expectTypeOf(grpoStep({ ...batch, logProbs: unknown }).dLogProbs).toEqualTypeOf<Tensor<'f32'>>()
})

test('one model at a time, of the right dtypes, options spelled right', () => {
  // @ts-expect-error
  grpoStep({ ...batch, logProbs: f32, logits: bf16, targets: i32 })
  // @ts-expect-error
  grpoStep({ ...batch, logProbs: f32, temperature: 2 })
  // @ts-expect-error
  grpoStep({ ...batch, logits: bf16 })
  // @ts-expect-error
  grpoStep({ ...batch, logits: i32, targets: i32 })
  // @ts-expect-error
  grpoStep({ ...batch, logits: bf16, targets: f32 })
  // @ts-expect-error
  grpoStep({ ...batch, hidden: bf16, weight: f32, targets: i32 })
  // @ts-expect-error
  grpoStep({ ...batch, logProbs: f32, clipHi: 0.3 })
  // @ts-expect-error
  grpoStep({ ...batch, logProbs: f32, mask: f32 })
  // @ts-expect-error
  grpoStep({ ...batch, logProbs: f32, estimator: 'ppo' })
})

test('the same for the steps of a trainer', () => {
  expectTypeOf(trainer.step(rollouts, { logProbs: f32 }).dLogProbs).toEqualTypeOf<Tensor<'f32'>>()
  expectTypeOf(
    trainer.step(rollouts, { logits: bf16, targets: i32, refLogProbs: f32 }).dLogits,
  ).toEqualTypeOf<Tensor<'bf16'>>()
  expectTypeOf(trainer.step(rollouts, trained)).toEqualTypeOf<GrpoStep>()
  // @ts-expect-error
  trainer.step(rollouts, { logProb: f32 })
  expectTypeOf(rollouts.oldLogProbs).toEqualTypeOf<Tensor<'f32'> | undefined>()
})

test('results of a tower follow what is asked for', () => {
  const plain = tower.encode({ pixelValues: bf16, gridThw })
  expectTypeOf(plain.merged).toEqualTypeOf<Tensor>()
  expectTypeOf(plain).not.toHaveProperty('hidden')
  expectTypeOf(plain).not.toHaveProperty('mass')
  const full = tower.encode({ pixelValues: bf16, gridThw, hiddenStates: true, massOf: [0] })
  expectTypeOf(full.hidden).toEqualTypeOf<Tensor[]>()
  expectTypeOf(full.mass).toEqualTypeOf<Tensor<'f32'>[]>()
  expectTypeOf(
    tower.encode({ pixelValues: bf16, gridThw, hiddenStates: false }),
  ).not.toHaveProperty('hidden')
  expectTypeOf(
    tower.encode({ pixelValues: bf16, gridThw, hiddenStates: some }).hidden,
  ).toEqualTypeOf<Tensor[] | undefined>()
  // @ts-expect-error
  tower.encode({ pixelValues: i32, gridThw })
})

test('evidence', () => {
  expectTypeOf(evidence.annotated).toEqualTypeOf<Tensor<'u8'>>()
  expectTypeOf(evidence.pixelValues().pixelValues).toEqualTypeOf<Tensor<'f32'>>()
  expectTypeOf(evidence.pixelValues({ dtype: 'bf16' }).pixelValues).toEqualTypeOf<Tensor<'bf16'>>()
  // @ts-expect-error
  collectEvidence({ image: f32, boxes: [] })
  // @ts-expect-error
  collectEvidence({ image, boxes: [], maxPixel: 3 })
  expectTypeOf(evidence.pixelValues({ dtype: 'u8' }).pixelValues).toEqualTypeOf<Tensor<'u8'>>()
  // @ts-expect-error
  evidence.pixelValues({ dtype: 'i32' })
  expectTypeOf(normalizePatches({ patches: image, dtype: 'f16' })).toEqualTypeOf<Tensor<'f16'>>()
  // @ts-expect-error
  normalizePatches({ patches: f32 })
  // @ts-expect-error
  tower.encode({ pixelValues: image, gridThw })
})

test('the roles and the answer, which is disposable', () => {
  expectTypeOf(perceiver.perceive({ image, question: 'q' })).toEqualTypeOf<Promise<Perception[]>>()
  const asked = { question: 'q', answerForm: 'mca' } as const
  expectTypeOf(reasoner.reason({ evidence, ...asked })).toEqualTypeOf<Promise<Reasoning[]>>()
  const given = answer({ perceiver, reasoner, image, ...asked })
  expectTypeOf(given).toEqualTypeOf<Promise<Answer>>()
  expectTypeOf<Answer>().toExtend<Disposable>()
  // @ts-expect-error
  answer({ perceiver, reasoner, image, question: 'q', answerForm: 'letter' })
  // @ts-expect-error
  new Perceiver(policy, { maxEvidenc: 3 })
  // @ts-expect-error
  new OpenAIPolicy({ baseURL: 'http://localhost/v1', model: 'm', timeout: 3 })
  // @ts-expect-error
  functionPolicy(() => 5)
  expectTypeOf(functionPolicy(async () => ({ text: 'a', tokens: [1] }))).toEqualTypeOf<Policy>()
})

test('questions keep their further fields', async () => {
  for await (const { question } of evaluate({ perceiver, reasoner, questions }))
    expectTypeOf(question).toEqualTypeOf<Numbered>()
})

test('recipes are options of PraGrpo', () => {
  expectTypeOf(paperSettings()).toEqualTypeOf<Required<PraGrpoSettings>>()
  expectTypeOf(alternatingSettings()).toExtend<PraGrpoSettings>()
  expectTypeOf(device.tensor(new Uint8Array(1), [1])).toEqualTypeOf<Tensor<'u8'>>()
})
