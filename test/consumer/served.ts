// Perceive-to-Reason on served models, as a strict consumer uses it. It is compiled, never run.
import {
  type AbortSignalLike,
  type Answer,
  type AnswerForm,
  alternating,
  answer,
  answerReward,
  boxIoU,
  type Completion,
  type Device,
  defaultPrompts,
  type EvidenceBox,
  evaluate,
  extractAnswer,
  functionPolicy,
  type IpcDescription,
  type IpcHandle,
  type Judged,
  loadMetadata,
  loadRollouts,
  modelVerifier,
  type OpenAIOptions,
  OpenAIPolicy,
  Perceiver,
  type PerceiverOptions,
  type Policy,
  type PolicyRequest,
  PraGrpo,
  type PraGrpoOptions,
  type PraGrpoSettings,
  type PromptOverrides,
  type Prompts,
  p2r,
  perceptionFault,
  type Question,
  Reasoner,
  type ReasonerOptions,
  RecordedPolicy,
  type RewardRules,
  type Role,
  type RoleMetrics,
  type RolloutBatch,
  type RolloutItem,
  type RolloutMetrics,
  recordPolicy,
  type Sample,
  type Schedule,
  saveRollouts,
  type Tensor,
  type TrainedModel,
  type Verifier,
} from 'p2r-kernels'

class Echo implements Policy {
  async generate({ prompt, n = 1 }: PolicyRequest): Promise<Completion[]> {
    return Array.from({ length: n }, () => ({ text: prompt, tokens: [1], logProbs: [-1] }))
  }
}

const options: OpenAIOptions = { baseURL: 'http://localhost:8000/v1', model: 'm', concurrency: 8 }
const form: AnswerForm = 'mca'
const rules: RewardRules = 'strict'

export async function ask(image: Tensor, signal: AbortSignalLike): Promise<Answer> {
  const served = recordPolicy(new OpenAIPolicy(options), 'a.jsonl')
  const replayed = await RecordedPolicy.load('a.jsonl')
  const prompts: PromptOverrides = { perceive: defaultPrompts.perceive, forms: { na: 'number' } }
  const sees: PerceiverOptions = { maxEvidence: 3, maxPixels: 1 << 20, temperature: 0, prompts }
  const thinks: ReasonerOptions = { rules, maxTokens: 100 }
  const perceiver = new Perceiver(served, sees)
  const reasoner = new Reasoner(replayed, thinks)
  const [perceived] = await perceiver.perceive({ image, question: 'q', n: 2, signal })
  if (perceived) {
    const { evidence } = perceived
    await reasoner.reason({ evidence, question: 'q', answerForm: form, n: 2, signal })
  }
  return answer({ perceiver, reasoner, image, question: 'q', answerForm: form, signal })
}

export async function score(boxes: EvidenceBox[], text: string): Promise<number> {
  const verifier: Verifier = modelVerifier(
    functionPolicy(() => 'yes'),
    { rules },
  )
  const fault: 'overlap' | 'label' | null = perceptionFault(boxes, { rules })
  const [a, b] = boxes
  if (fault || (a && b && boxIoU(a.bbox2d, b.bbox2d) > 0.5)) return 0
  return answerReward({ answer: extractAnswer(text), truth: 'A', form, verifier })
}

export async function run(image: Tensor): Promise<Judged<Question>[]> {
  const [perceiver, reasoner] = [new Perceiver(new Echo()), new Reasoner(new Echo())]
  const question: Question = {
    question: 'q',
    answerForm: form,
    truth: 'A',
    load: async () => image,
  }
  const all: Judged<Question>[] = []
  for await (const judged of evaluate({ perceiver, reasoner, questions: [question] }))
    all.push(judged)
  return all
}

export async function train(device: Device, samples: Sample[], model: TrainedModel) {
  const schedule: Schedule = { perceiver: 2, reasoner: 1 }
  const settings: PraGrpoSettings = { ...p2r(), ...alternating({ steps: 3 }), schedule }
  const made: PraGrpoOptions = { ...settings, perceiver: new Echo(), reasoner: new Echo(), device }
  const trainer = new PraGrpo(made)
  const role: Role = trainer.role
  using batch: RolloutBatch = await trainer.rollout(samples)
  const items: readonly RolloutItem[] = batch.items
  const metrics: RolloutMetrics = batch.metrics
  await saveRollouts('b.safetensors', batch)
  using loaded = await loadRollouts('b.safetensors', device)
  using step = trainer.step(loaded, model)
  const all: Partial<Record<Role, RoleMetrics>> = await trainer.metrics()
  return [role, items.length, metrics.errors, all, (await step.metrics()).loss, trainer.finished]
}

export async function share(tensor: Tensor, device: Device): Promise<Tensor[]> {
  using handle: IpcHandle = await tensor.ipcHandle()
  const description: IpcDescription = JSON.parse(JSON.stringify(handle))
  const { format } = await loadMetadata('b.safetensors')
  const prompts: Prompts = defaultPrompts
  return prompts.system === format ? [] : [device.fromIpcHandle(description)]
}
