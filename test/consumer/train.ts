// Training of a local model as a strict consumer uses it. It is compiled, never run.
import {
  type Device,
  type LearningRateOptions,
  LocalTrainer,
  type LocalTrainerOptions,
  type LoraOptions,
  type OptimizerOptions,
  type Sample,
  type TrainMetrics,
  type TrainRoleMetrics,
  type TrainStepOptions,
} from 'p2r-kernels'

export async function train(device: Device, samples: Sample[]): Promise<number[]> {
  const lora: LoraOptions = { rank: 8, targets: ['q_proj', 'v_proj'] }
  const rate: LearningRateOptions = { lr: 1e-5, decay: 'cosine', steps: 10, warmup: 2 }
  const optimizer: OptimizerOptions = { maxGradNorm: 1, betas: [0.9, 0.99] }
  const options: LocalTrainerOptions = { ...rate, ...optimizer, lora, freezeTower: true }
  using trainer = await LocalTrainer.load('folder', device, options)
  const own: TrainStepOptions = { onBatch: ({ items }) => void items.length }
  const metrics: TrainMetrics = await trainer.step(samples, own)
  const roles: TrainRoleMetrics[] = metrics.roles
  await trainer.saveState('state.safetensors')
  await trainer.save('trained')
  return roles.map(({ samplerDifference }) => samplerDifference)
}
