// Attention and the losses, as a strict consumer calls them. It is compiled, never run.
import {
  type AdvantageEstimator,
  type AdvantageOptions,
  type AdvantagesBatch,
  type AttentionInput,
  applyRotary,
  attention,
  attentionBackward,
  attentionMass,
  type Device,
  type GroupAdvantagesArgs,
  type GrpoBatch,
  type GrpoModel,
  type GrpoStep,
  type GrpoStepArgs,
  groupAdvantages,
  grpoStep,
  type HeadModel,
  type HeadStep,
  informativeGroups,
  kernels,
  type LogitsModel,
  type LogitsStep,
  type LogProbsModel,
  type LogProbsShard,
  type LogProbsStep,
  type LossAggregation,
  type LossMetrics,
  mergeLogProbs,
  type PolicyLossArgs,
  type PolicyLossOptions,
  policyLoss,
  type RewardsBatch,
  type RolloutCorrectionArgs,
  type RolloutCorrectionMetrics,
  type RolloutCorrectionOptions,
  type RolloutCorrectionResult,
  type RolloutRejection,
  rolloutCorrection,
  type Tensor,
  type TokenLogProbsBackwardArgs,
  tokenLogProbs,
  tokenLogProbsBackward,
  tokenLogProbsShard,
  trlDefaults,
  trlRolloutCorrection,
  verlRolloutCorrection,
  visionRotary,
  windowLayout,
} from 'p2r-kernels'

export function encoder(device: Device, qkv: Tensor, dOut: Tensor): Tensor[] {
  const gridThw = [[1, 8, 8]] as const
  const { cos, sin } = visionRotary({ gridThw, headDim: 64, device })
  const { index, inverse, cuSeqlens } = windowLayout({ gridThw, window: 4 })
  const [kernel] = kernels('attention', device)
  const input: AttentionInput = { qkv, rotary: { cos, sin }, cuSeqlens, ...(kernel && { kernel }) }
  const { out, lse } = attention(input)
  const packed = attentionBackward({ dOut, qkv, out, lse, cuSeqlens, deterministic: false })
  const [q, k, v] = [out, out, out]
  const apart = attentionBackward({ dOut, q, k, v, out, lse, cuSeqlens: [0, index.length] })
  const mass = attentionMass({ q, k, lse, cuSeqlens: [0, inverse.length] })
  return [packed.dQkv, apart.dQ, apart.dK, apart.dV, mass, applyRotary({ x: q, cos, sin })]
}

export function logProbs(logits: Tensor, targets: Tensor): Tensor {
  using whole = tokenLogProbs({ logits, targets, temperature: 0.7, entropy: true })
  const shard: LogProbsShard = tokenLogProbsShard({ logits, targets, vocabOffset: 0 })
  using merged = mergeLogProbs([shard, shard])
  const { stats } = merged
  const dLogProbs = whole.entropy ?? merged.logProbs
  const back: TokenLogProbsBackwardArgs = { logits, targets, stats, dLogProbs, inPlace: true }
  return tokenLogProbsBackward(back)
}

export async function correction(tokens: Tensor, old: Tensor): Promise<RolloutCorrectionMetrics> {
  const rule: RolloutRejection = { measure: 'k3', over: 'mean', high: 0.01 }
  const options: RolloutCorrectionOptions[] = [
    { ...trlRolloutCorrection, reject: [rule] },
    verlRolloutCorrection,
  ]
  const engines = { logProbs: tokens, rolloutLogProbs: old, cuSeqlens: [0, 4] }
  const a: RolloutCorrectionArgs = { ...engines, ...options[0] }
  using corrected = rolloutCorrection(a)
  const { importanceWeights, mask }: RolloutCorrectionResult = corrected
  policyLoss({ logProbs: tokens, advantages: tokens, cuSeqlens: [0, 4], importanceWeights, mask })
  return corrected.metrics()
}

export async function loss(tokens: Tensor, rewards: Tensor): Promise<LossMetrics[]> {
  const estimator: AdvantageEstimator = 'rloo'
  const input: GroupAdvantagesArgs = { rewards, groups: [0, 0, 1, 1], estimator, singleton: 'zero' }
  const advantages = groupAdvantages(input)
  informativeGroups({ rewards, groups: Int32Array.of(0, 0, 1, 1) }).dispose()
  const aggregation: LossAggregation = 'seq-mean-token-mean'
  const options: PolicyLossOptions = { ...trlDefaults, aggregation, dualClip: false }
  const cuSeqlens = [0, 1, 2, 3, 4]
  const given: PolicyLossArgs = { logProbs: tokens, advantages, cuSeqlens, ...options }
  using own = policyLoss(given)
  const scaled: AdvantageOptions = { scale: 'batch', epsilon: 1e-4 }
  const batch: RewardsBatch = { rewards, groups: [0, 0, 1, 1], cuSeqlens, ...scaled, ...options }
  const model: GrpoModel = { logProbs: tokens }
  const args: GrpoStepArgs = { ...model, ...batch }
  using step: GrpoStep & { advantages: Tensor } = grpoStep(args)
  const byCaller: AdvantagesBatch = { advantages, cuSeqlens, ...options }
  using ours: GrpoStep = grpoStep({ ...model, ...byCaller })
  return [await own.metrics(), await step.metrics(), await ours.metrics()]
}

export function gradients(
  batch: GrpoBatch,
  hidden: Tensor<'bf16'>,
  targets: Tensor<'i32'>,
  logProbs: Tensor<'f32'>,
): Tensor[] {
  const plain: LogProbsModel = { logProbs }
  const logits: LogitsModel<'bf16'> = { logits: hidden, targets }
  const head = { hidden, weight: hidden, targets }
  const biased = { ...head, bias: logProbs }
  const any: HeadModel<'bf16'> = biased
  using a: LogProbsStep = grpoStep({ ...plain, ...batch })
  using b: LogitsStep<'bf16'> = grpoStep({ ...logits, ...batch })
  using c: HeadStep<'bf16'> = grpoStep({ ...head, ...batch })
  using d = grpoStep({ ...biased, ...batch })
  return [a.dLogProbs, b.dLogits, c.dHidden, d.dBias, any.hidden]
}
