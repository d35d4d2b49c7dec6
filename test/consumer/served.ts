// Perceive-to-Reason on served models, as a strict consumer uses it. It is compiled, never run.
import {
  type AbortSignalLike,
  type AlternatingSettingsOptions,
  type Answer,
  type AnswerArgs,
  type Answerer,
  type AnswerForm,
  type AnswerQuestion,
  type AnswerRewardArgs,
  alternatingSettings,
  answer,
  answerReward,
  type Box,
  boxIoU,
  type Completion,
  type Device,
  defaultPrompts,
  type EvaluateArgs,
  type EvaluateOptions,
  type EvidenceBox,
  type ExtractAnswerOptions,
  evaluate,
  extractAnswer,
  formatReward,
  functionPolicy,
  type GroundingRewards,
  type GroundingRewardsArgs,
  groundingRewards,
  type IpcDescription,
  type IpcHandle,
  type IpcOpenOptions,
  type IpcOptions,
  type Judged,
  type LoadRolloutsOptions,
  loadMetadata,
  loadRollouts,
  type ModelVerifierOptions,
  matchedIoU,
  modelVerifier,
  OpenAIPolicy,
  type OpenAIPolicyOptions,
  type PaperSettingsOptions,
  type PerceiveArgs,
  type PerceivePromptArgs,
  Perceiver,
  type PerceiverOptions,
  type Perception,
  type PerceptionFaultOptions,
  type Point,
  type Policy,
  type PolicyFunction,
  type PolicyRequest,
  PraGrpo,
  type PraGrpoOptions,
  type PraGrpoSettings,
  type PromptOverrides,
  type Prompts,
  paperSettings,
  perceivePrompt,
  perceptionFault,
  pointInBoxes,
  type Question,
  type ReasonArgs,
  Reasoner,
  type ReasonerOptions,
  type Reasoning,
  type ReasonPromptArgs,
  RecordedPolicy,
  type ReproductionSettings,
  type RewardRules,
  type Role,
  type RoleMetrics,
  type RolePrompt,
  type RolloutBatch,
  type RolloutItem,
  type RolloutMetrics,
  type RolloutOptions,
  type RolloutRequest,
  reasonPrompt,
  recordPolicy,
  reproductionSettings,
  type Sample,
  type SaveRolloutsOptions,
  type Schedule,
  type ShownRegion,
  type StepLogProbs,
  type StoredImage,
  saveRollouts,
  type Tensor,
  type Tool,
  type ToolCall,
  type ToolResult,
  type TrainedModel,
  type Turn,
  unionIoU,
  type Verifier,
  type VerifierArgs,
  ZoomAgent,
  type ZoomAgentOptions,
  type ZoomArgs,
  type Zooming,
  type ZoomOptions,
  type ZoomPromptArgs,
  zoomPrompt,
  zoomTool,
} from 'p2r-kernels'

class Echo implements Policy {
  async generate({ prompt, n = 1 }: PolicyRequest): Promise<Completion[]> {
    return Array.from({ length: n }, () => ({ text: prompt, tokens: [1], logProbs: [-1] }))
  }
}

const options: OpenAIPolicyOptions = {
  baseURL: 'http://localhost:8000/v1',
  model: 'm',
  concurrency: 8,
}
const form: AnswerForm = 'mca'
const rules: RewardRules = 'strict'

export async function ask(image: Tensor<'u8'>, signal: AbortSignalLike): Promise<Answer> {
  const served = recordPolicy(new OpenAIPolicy(options), 'a.jsonl')
  const replayed = await RecordedPolicy.load('a.jsonl')
  const prompts: PromptOverrides = { perceive: defaultPrompts.perceive, forms: { na: 'number' } }
  const sees: PerceiverOptions = { maxEvidence: 3, maxPixels: 1 << 20, temperature: 0, prompts }
  const thinks: ReasonerOptions = { rules, maxTokens: 100 }
  const perceiver = new Perceiver(served, sees)
  const reasoner = new Reasoner(replayed, thinks)
  const asked: PerceiveArgs = { image, question: 'q', n: 2, signal }
  const [perceived]: Perception[] = await perceiver.perceive(asked)
  if (perceived) {
    const { evidence } = perceived
    const shown: ReasonArgs = { evidence, question: 'q', answerForm: form, n: 2, signal }
    const reasoned: Reasoning[] = await reasoner.reason(shown)
    if (!reasoned[0]?.answer) evidence.dispose()
  }
  const a: AnswerArgs = { perceiver, reasoner, image, question: 'q', answerForm: form, signal }
  using made: Answer = await answer(a)
  return made.evidence.hasEvidence ? made : answer(a)
}

export async function zoom(asked: AnswerQuestion, evaluated: EvaluateOptions): Promise<Turn[]> {
  const budget: ZoomOptions = { maxTurns: 3, pixelBudget: 1 << 24, toolCalls: 'text' }
  const asking: ZoomAgentOptions = { ...budget, temperature: 0.7, rules }
  const agent = new ZoomAgent(new Echo(), asking)
  const answerer: Answerer = { agent }
  using made: Answer = await answer({ ...answerer, ...asked })
  for await (const { pixels = 0 } of evaluate({ agent, ...evaluated })) if (pixels) break
  const a: ZoomArgs = { ...asked, n: 2 }
  const all: Zooming[] = await agent.zoom(a)
  const shown: ShownRegion[] = all.flatMap((each) => [...each.shown])
  const tool: Tool = zoomTool(shown.length ? 'thousandths' : 'absolute')
  const told: ZoomPromptArgs = { question: 'q', answerForm: form, tools: [tool] }
  const call: ToolCall = { name: tool.name, arguments: zoomPrompt(told).prompt }
  const result: ToolResult = { text: call.name, images: [] }
  return [...made.turns, { completion: { text: '', toolCalls: [call] }, results: [result] }]
}

export async function score(boxes: EvidenceBox[], text: string): Promise<number> {
  const judge: PolicyFunction = () => 'yes'
  const judging: ModelVerifierOptions = { rules, maxTokens: 8 }
  const verifier: Verifier = modelVerifier(functionPolicy(judge), judging)
  const judged: VerifierArgs = { question: 'q', answer: 'a', truth: 'A' }
  const faults: PerceptionFaultOptions = { rules }
  const fault: 'overlap' | 'label' | null = perceptionFault(boxes, faults)
  if (await verifier(judged)) return 1
  const [a, b] = boxes
  if (fault || (a && b && boxIoU(a.bbox2d, b.bbox2d) > 0.5)) return 0
  const extract: ExtractAnswerOptions = { rules }
  const scored: AnswerRewardArgs = {
    answer: extractAnswer(text, extract),
    truth: 'A',
    form,
    verifier,
  }
  return answerReward(scored)
}

export function ground(text: string, truth: Box[], centre: Point): number {
  const a: GroundingRewardsArgs = { text, truth }
  const { iou, unionIoU: union, pointInBox, format }: GroundingRewards = groundingRewards(a)
  const apart = matchedIoU(truth, truth) + unionIoU(truth, truth) + pointInBoxes(centre, truth)
  return iou + union + pointInBox + format + apart + formatReward(text, 'reasoner')
}

export async function run(image: Tensor<'u8'>): Promise<Judged<Question>[]> {
  const [perceiver, reasoner] = [new Perceiver(new Echo()), new Reasoner(new Echo())]
  const question: Question = {
    question: 'q',
    answerForm: form,
    truth: 'A',
    load: async () => image,
  }
  const all: Judged<Question>[] = []
  const a: EvaluateArgs = { perceiver, reasoner, questions: [question] }
  for await (const judged of evaluate(a)) all.push(judged)
  return all
}

export function asPublished(baseURL: string): [Perceiver, Reasoner] {
  const settings: ReproductionSettings = reproductionSettings()
  const policy = new OpenAIPolicy({ baseURL, model: 'm', ...settings.policy })
  return [new Perceiver(policy, settings.perceiver), new Reasoner(policy, settings.reasoner)]
}

export async function train(device: Device, samples: Sample[], model: TrainedModel) {
  const schedule: Schedule = { perceiver: 2, reasoner: 1 }
  const paper: PaperSettingsOptions = { samples: 100 }
  const turns: AlternatingSettingsOptions = { steps: 3 }
  const settings: PraGrpoSettings = {
    ...paperSettings(paper),
    ...alternatingSettings(turns),
    schedule,
  }
  const made: PraGrpoOptions = { ...settings, perceiver: new Echo(), reasoner: new Echo(), device }
  const trainer = new PraGrpo(made)
  const role: Role = trainer.role
  const stops: RolloutOptions = {}
  using batch: RolloutBatch = await trainer.rollout(samples, stops)
  const items: readonly RolloutItem[] = batch.items
  const metrics: RolloutMetrics = batch.metrics
  const saving: SaveRolloutsOptions = { images: 'files' }
  await saveRollouts('b.safetensors', batch, saving)
  const loading: LoadRolloutsOptions = { images: false }
  using loaded = await loadRollouts('b.safetensors', device, loading)
  const others: StepLogProbs = loaded.oldLogProbs ? { oldLogProbs: loaded.oldLogProbs } : {}
  using step = trainer.step(loaded, { ...model, ...others })
  const all: Partial<Record<Role, RoleMetrics>> = await trainer.metrics()
  return [role, items.length, metrics.errors, all, (await step.metrics()).loss, trainer.finished]
}

/** The tokens and images of an item, as a forward pass takes them. */
export function asked({ request, completion }: RolloutItem): [number[], readonly Tensor<'u8'>[]] {
  if (!request?.promptTokens || !completion.tokens) return [[], []]
  return [[...request.promptTokens, ...completion.tokens], request.images]
}

export function hashes({ stored = [] }: RolloutRequest): string[] {
  return stored.map(({ sha256, file }: StoredImage) => file ?? sha256)
}

export function prompts(question: string): RolePrompt[] {
  const perceives: PerceivePromptArgs = { question }
  const reasons: ReasonPromptArgs = { question, answerForm: form, hasEvidence: true }
  return [perceivePrompt(perceives), reasonPrompt(reasons)]
}

export async function share(tensor: Tensor, device: Device): Promise<Tensor[]> {
  const how: IpcOptions = { file: true }
  const opening: IpcOpenOptions = { anyFile: how.file === true }
  using handle: IpcHandle = await tensor.ipcHandle(how)
  const description: IpcDescription = JSON.parse(JSON.stringify(handle))
  const { format } = await loadMetadata('b.safetensors')
  const prompts: Prompts = defaultPrompts
  return prompts.system === format ? [] : [device.fromIpcHandle(description, opening)]
}
