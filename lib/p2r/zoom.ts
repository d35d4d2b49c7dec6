import { type AbortSignalLike, checkSignal } from '../abort.js'
import {
  checkArguments,
  checkObject,
  checkPositive,
  checkReceiver,
  checkSamples,
  checkString,
  checkText,
  choice,
  describeValue,
  isJsonObject,
  isObject,
  type Names,
} from '../arguments.js'
import { refuse } from '../errors.js'
import { type Region, resample } from '../ops/crop_resample.js'
import type { PixelBox } from '../ops/draw_boxes.js'
import { imageSize, type Tensor } from '../tensor.js'
import type { EvidenceBox } from './boxes.js'
import {
  type Coordinates,
  checkEvidenceOptions,
  type Evidence,
  type EvidenceOptions,
  type EvidenceSizes,
  evidenceOf,
  isResizable,
  sized,
} from './evidence.js'
import {
  answered,
  ask,
  type Completion,
  checkPolicy,
  checkSampling,
  messageOf,
  type Policy,
  type PolicyRequest,
  type Tool,
  type ToolCall,
  type ToolResult,
  type Turn,
} from './policy.js'
import {
  type AnswerForm,
  checkForm,
  type PromptOverrides,
  type Prompts,
  promptsOf,
  type RolePrompt,
  zoomPrompt,
} from './prompts.js'
import { afterThinking, extractAnswer, type RewardRules, rulesOf } from './reward.js'
import type { RequestImages } from './rollouts.js'

/** What a ZoomAgent may spend on a question, and how it asks. */
export interface ZoomOptions extends EvidenceSizes {
  /**
   * Requests for one answer at most. In the last one the model may not call the tool any more.
   * @default 6
   */
  maxTurns?: number
  /**
   * Pixels of all images shown for one answer at most, the first one and every crop, each counted once. A crop that
   * does not fit is made smaller; where less than minPixels is left, the model has to answer.
   * @default 5 · maxPixels, what the two-stage form shows with three crops
   */
  pixelBudget?: number
  /**
   * The smallest image and crop that are shown: smaller ones are enlarged.
   * @default 262_144 (Qwen-Agent's), or maxPixels where that is less
   */
  minPixels?: number
  /**
   * The largest first image.
   * @default 4_194_304
   */
  maxPixels?: number
  /**
   * smartResize's rules.
   * @default 'qwen-vl-utils'
   */
  resizeRules?: EvidenceOptions['rules']
  /**
   * What the tool's boxes are measured in: thousandths of the width and height of the image that a call names (Qwen3-VL),
   * or pixels of that image as it is shown (DeepEyes, Qwen2.5-VL).
   * @default 'thousandths'
   */
  coordinates?: Coordinates
  /**
   * How the model is told of the tool, and calls it: by the API's `tools` and `tool_calls`, or in 'text', for a server
   * without tools: the system prompt describes it, and the model writes `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.
   * Calls in the text are read either way.
   * @default 'api'
   */
  toolCalls?: 'api' | 'text'
  /**
   * The tool in other words, for a model that was trained with them. Its arguments have to be those of zoomTool.
   * @default zoomTool(coordinates)
   */
  tool?: Tool
}

/** Options of ZoomAgent. */
export interface ZoomAgentOptions extends ZoomOptions {
  /**
   * Of the sampling; 0 takes the most probable token.
   * @default 0 for one rollout, 1 for several
   */
  temperature?: number
  /**
   * The longest output of one turn, in tokens, thinking included.
   * @default 2048
   */
  maxTokens?: number
  /**
   * Templates instead of the default prompts: `system`, `zoom` and `forms` are used.
   * @default {}
   */
  prompts?: PromptOverrides
  /**
   * Of finding the answer in the last output; see extractAnswer.
   * @default 'reference'
   */
  rules?: RewardRules
}

/** The arguments of ZoomAgent's `zoom`. */
export interface ZoomArgs {
  /** u8 [height, width, 3]. It stays the caller's, and must outlive the evidence. */
  image: Tensor<'u8'>
  /** The question, with its options, if it has any. */
  question: string
  /** How the policy is told to answer: by a letter ('mca'), a number ('na') or in words ('free_form'). */
  answerForm: AnswerForm
  /**
   * How many trajectories to sample.
   * @default 1
   */
  n?: number
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/** An image that was shown: a part of the source, and its size. */
export interface ShownRegion {
  /** x0, y0, x1, y1 in pixels of the source image, half open. */
  box: PixelBox
  /** Of the image as it was shown, in pixels. */
  height: number
  /** Of the image as it was shown, in pixels. */
  width: number
}

/** One trajectory of a ZoomAgent: the model's outputs, and what the tool gave it. */
export interface Zooming {
  /**
   * The last output, and where the policy gives tokens, those of the whole trajectory behind the first prompt: the outputs
   * and between them the tokens of tool results, whose `mask` is 0 and whose log-probabilities are 0.
   */
  completion: Completion
  /** The answer in the last output; see extractAnswer. '' where the turns ran out. */
  answer: string
  /** The outputs before the last, each with the results of its calls, without their images. */
  turns: readonly Turn[]
  /** What the policy was asked first. */
  asked: RolePrompt
  /** Requests that it took. */
  requests: number
  /** What was shown, in order: the whole image, then the crops. */
  shown: readonly ShownRegion[]
  /** Pixels of all images shown. */
  pixels: number
  /** Number of calls that gave no crop: not readable, of another tool, out of range, or beyond the budget. */
  failedCalls: number
  /** Why it ended: the model answered, or still called the tool in its last turn. */
  ended: 'answer' | 'turns'
  /** Why the completion has no tokens, though each output has: nothing can be trained on. */
  untrainable?: string
  /** The regions that were cropped, as evidence. The caller disposes it. */
  evidence: Evidence
}

const zoomNames: Names<ZoomOptions> = {
  maxTurns: true,
  pixelBudget: true,
  minPixels: true,
  maxPixels: true,
  cropMaxPixels: true,
  resizeRules: true,
  coordinates: true,
  toolCalls: true,
  tool: true,
}
const toolNames: Names<Tool> = { name: true, description: true, parameters: true }
const optionNames: Names<ZoomAgentOptions> = {
  ...zoomNames,
  temperature: true,
  maxTokens: true,
  prompts: true,
  rules: true,
}
const argumentNames: Names<ZoomArgs> = {
  image: true,
  question: true,
  answerForm: true,
  n: true,
  signal: true,
}

/** Calls of one output that are executed; a model that repeats itself writes hundreds. */
const mostCalls = 8
/** Characters of a call's arguments that are read. */
const longestArguments = 4096
/** Pixels of the source that a crop has at least on each side, where the image has them. */
const leastSource = 32

/**
 * The description of the tool, by the names that Qwen3-VL and DeepEyes were trained with.
 *
 * @param coordinates the unit of the boxes.
 * @throws P2RError ERR_VALUE for an unknown unit.
 * @example
 * ```js
 * import { zoomTool } from 'p2r-kernels'
 *
 * const { name, parameters } = zoomTool('thousandths')
 * console.log(name, parameters.required) // image_zoom_in_tool [ 'bbox_2d' ]
 * ```
 */
export function zoomTool(coordinates: Coordinates): Tool {
  choice(coordinates, ['thousandths', 'absolute'], 'coordinates', 'zoomTool')
  const unit =
    coordinates === 'thousandths'
      ? "in thousandths of the image's width and height, from 0 to 1000"
      : 'in pixels of the image'
  return {
    name: 'image_zoom_in_tool',
    description: 'Shows a region of an image enlarged, cut from the image in its full resolution.',
    parameters: {
      type: 'object',
      properties: {
        bbox_2d: {
          type: 'array',
          items: { type: 'number' },
          minItems: 4,
          maxItems: 4,
          description: `The region as [x1, y1, x2, y2], its top left and its bottom right corner, ${unit}.`,
        },
        label: { type: 'string', description: 'What the region shows.' },
        img_idx: {
          type: 'integer',
          description:
            'Which image the box is in: 0 for the first, 1 for the first crop, and so on.',
        },
      },
      required: ['bbox_2d'],
    },
  }
}

/**
 * Asks a policy for the answer in several turns: it may call `image_zoom_in_tool` for crops of the image, until it answers
 * or its budget of turns and pixels is spent.
 *
 * Crops are cut from the image in its full resolution, also those of crops. A call that cannot be executed is answered by
 * a text that says why, and counts as a turn. Source: the tool of Qwen-Agent (image_zoom_in_qwen3vl) and DeepEyes
 * (arXiv:2505.14362).
 *
 * @throws P2RError ERR_VALUE for a policy without `generate`, and for wrong options.
 * @example
 * ```js
 * import { functionPolicy, openDevice, ZoomAgent } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([480, 640, 3], 'u8')
 * const policy = functionPolicy(({ turns = [] }) =>
 *   turns.length
 *     ? `<answer>${turns[0].results[0].images[0].shape}</answer>`
 *     : {
 *         text: '',
 *         toolCalls: [{ id: '1', name: 'image_zoom_in_tool', arguments: '{"bbox_2d": [0, 0, 500, 500]}' }],
 *       },
 * )
 * const agent = new ZoomAgent(policy, { minPixels: 65_536, maxPixels: 262_144 })
 * const [made] = await agent.zoom({ image, question: 'What is shown?', answerForm: 'free_form' })
 * console.log(made.answer, made.requests, made.pixels) // 256,320,3 2 321536
 * made.evidence.dispose()
 * device.dispose()
 * ```
 */
export class ZoomAgent {
  readonly #policy: Policy
  readonly #options: ZoomAgentOptions
  readonly #limits: Limits
  readonly #prompts: Prompts

  constructor(policy: Policy, options: ZoomAgentOptions = {}) {
    const op = 'ZoomAgent'
    this.#policy = checkPolicy(policy, 'policy', op)
    options = checkArguments(options, optionNames, op)
    checkSampling(options, op)
    rulesOf(options.rules, op)
    this.#limits = limitsOf(options, op)
    this.#options = { ...options }
    this.#prompts = promptsOf(options.prompts, op)
  }

  /**
   * Samples n trajectories. The first turn is one request for all of them.
   *
   * @throws P2RError ERR_VALUE, ERR_SHAPE and ERR_DTYPE for wrong arguments; ERR_POLICY when the policy fails, or declines
   *   the only trajectory. Of several, each that is no answer has a completion with a `refusal` or a `failure`, and an empty
   *   answer.
   */
  async zoom(a: ZoomArgs): Promise<Zooming[]> {
    const op = 'zoom'
    checkReceiver(ZoomAgent.is(this), 'ZoomAgent', op)
    a = checkArguments(a, argumentNames, op)
    const { image, n = 1 } = a
    const [height, width] = imageSize(image, op)
    const question = checkString(a.question, 'question', op)
    const answerForm = checkForm(a.answerForm, 'answerForm', op)
    checkSamples(n, 'n', op)
    const signal = checkSignal(a.signal, op)
    const { temperature = n > 1 ? 1 : 0, maxTokens = 2048 } = this.#options
    const limits = this.#limits
    const whole: PixelBox = [0, 0, width, height]
    const first = sized(whole, limits.minPixels, limits.maxPixels, limits.resizeRules)
    const [seen] = resample({ images: [image], regions: [first] }, op)
    const { api, tool } = limits
    const asked = zoomPrompt({
      question,
      answerForm,
      prompts: this.#prompts,
      ...(!api && { tools: [tool] }),
    })
    const request: PolicyRequest = {
      role: 'reasoner',
      ...asked,
      images: [seen!],
      temperature,
      maxTokens,
      ...(api && { tools: [tool], toolChoice: limits.maxTurns > 1 ? 'auto' : 'none' }),
      ...(signal && { signal }),
    }
    const all: Trajectory[] = []
    try {
      const completions = await ask(this.#policy, { ...request, n }, op)
      return await Promise.all(
        completions.map((completion) => {
          const trajectory = new Trajectory(image, first, limits)
          all.push(trajectory)
          return this.#follow(trajectory, completion, request, n === 1)
        }),
      )
    } finally {
      seen!.dispose()
      for (const trajectory of all) trajectory.free()
    }
  }

  /** Executes calls and asks again until the model answers. */
  async #follow(
    trajectory: Trajectory,
    first: Completion,
    request: PolicyRequest,
    only: boolean,
  ): Promise<Zooming> {
    const op = 'zoom'
    const { maxTurns, api } = this.#limits
    let completion = first
    let requests = 1
    let calls: readonly ToolCall[]
    for (;;) {
      if (only) answered(completion, 'reasoner', op)
      calls = callsIn(completion)
      if (!calls.length || requests === maxTurns) break
      const last = requests === maxTurns - 1
      trajectory.turns.push({ completion, results: trajectory.execute(calls, last) })
      const more = {
        ...request,
        turns: trajectory.turns,
        ...(api && {
          toolChoice: last || trajectory.spent ? ('none' as const) : ('auto' as const),
        }),
      }
      requests++
      try {
        completion = (await ask(this.#policy, { ...more, n: 1 }, op))[0]!
      } catch (error) {
        request.signal?.throwIfAborted()
        if (only) throw error
        completion = { text: '', failure: messageOf(error) }
      }
    }
    const { rules } = this.#options
    const { system, prompt } = request
    return trajectory.end(completion, {
      asked: { system, prompt },
      requests,
      ended: calls.length ? 'turns' : 'answer',
      answer: calls.length ? '' : extractAnswer(completion.text, rules ? { rules } : {}),
    })
  }

  /** @internal */
  static is(value: unknown): value is ZoomAgent {
    return isObject(value) && #policy in value
  }
}

/** @internal The argument `agent`. */
export function checkAgent(value: unknown, op: string): ZoomAgent {
  if (!ZoomAgent.is(value))
    refuse('ERR_VALUE', op, `agent must be a ZoomAgent, got ${describeValue(value)}`)
  return value
}

/** @internal The images of a trajectory, computed from its image. */
export class RegionImages implements RequestImages {
  readonly images: readonly Tensor<'u8'>[]

  constructor(image: Tensor<'u8'>, shown: readonly ShownRegion[]) {
    this.images = resample({ images: [image], regions: shown }, 'request')
  }

  [Symbol.dispose](): void {
    for (const image of this.images) image.dispose()
  }
}

/** @internal Refuses wrong options of a trainer's `zoom`. */
export function checkZoomOptions(options: ZoomOptions, name: string, op: string): void {
  options = checkArguments(options, zoomNames, op, name)
  limitsOf(options, op)
}

interface Limits {
  maxTurns: number
  pixelBudget: number
  minPixels: number
  maxPixels: number
  cropMaxPixels: number
  resizeRules: EvidenceOptions['rules']
  coordinates: Coordinates
  api: boolean
  tool: Tool
}

function limitsOf(options: ZoomOptions, op: string): Limits {
  const { maxPixels = 4096 * 32 * 32, coordinates = 'thousandths', resizeRules } = options
  const { cropMaxPixels = maxPixels, maxTurns = 6 } = options
  const { minPixels = Math.min(256 * 32 * 32, maxPixels, cropMaxPixels) } = options
  const { pixelBudget = 5 * maxPixels, toolCalls = 'api' } = options
  checkPositive(maxTurns, 'maxTurns', op)
  checkEvidenceOptions(
    {
      minPixels,
      maxPixels,
      cropMaxPixels,
      coordinates,
      ...(resizeRules && { rules: resizeRules }),
    },
    op,
  )
  checkPositive(pixelBudget, 'pixelBudget', op)
  if (pixelBudget < maxPixels)
    refuse(
      'ERR_VALUE',
      op,
      `pixelBudget must be at least maxPixels, ${maxPixels}, got ${pixelBudget}`,
    )
  const api = choice(toolCalls, ['api', 'text'], 'toolCalls', op) === 'api'
  const { tool = zoomTool(coordinates) } = options
  checkArguments(tool, toolNames, op, 'tool')
  checkText(tool.name, 'tool.name', op)
  checkString(tool.description, 'tool.description', op)
  checkObject(tool.parameters, 'tool.parameters', op)
  return {
    maxTurns,
    pixelBudget,
    minPixels,
    maxPixels,
    cropMaxPixels,
    resizeRules,
    coordinates,
    api,
    tool,
  }
}

/** The calls of an output: those of the API, else those in its text behind the thought. */
function callsIn(completion: Completion): readonly ToolCall[] {
  if (completion.failure !== undefined || completion.refusal !== undefined) return []
  if (completion.toolCalls?.length) return completion.toolCalls
  const [open, close] = ['<tool_call>', '</tool_call>']
  const text = afterThinking(completion.text)
  const calls: ToolCall[] = []
  // One more than are executed, for the model to be told so.
  for (let at = text.indexOf(open); at >= 0 && calls.length <= mostCalls; ) {
    const end = text.indexOf(close, at)
    // A call that was cut off is none.
    if (end < 0) break
    calls.push(callOf(text.slice(at + open.length, end)))
    at = text.indexOf(open, end)
  }
  return calls
}

/**
 * A call as chat templates have it: { "name": ..., "arguments": {...} } of Hermes, Qwen2.5 and Qwen3-VL, or the tags of
 * Qwen3.5, <function=...><parameter=...>.
 */
function callOf(text: string): ToolCall {
  const call = jsonOf(text) ?? taggedCall(text)
  if (!isJsonObject(call)) return { name: '', arguments: text }
  const { name, arguments: given } = call
  return {
    name: typeof name === 'string' ? name : '',
    arguments: typeof given === 'string' ? given : JSON.stringify(given ?? {}),
  }
}

function taggedCall(text: string): { name: string; arguments: object } | undefined {
  if (text.length > longestArguments) return undefined
  const name = /<function=([^<>\s]+)>/.exec(text)?.[1]
  if (name === undefined) return undefined
  const parameters = text.matchAll(/<parameter=([^<>\s]+)>([^<]*)<\/parameter>/g)
  const given = Array.from(parameters, ([, key, value]) => [key, jsonOf(value!) ?? value!.trim()])
  return { name, arguments: Object.fromEntries(given) }
}

function jsonOf(text: string): unknown {
  if (text.length > longestArguments) return undefined
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

/** What a model is told instead of a crop. */
class NoCrop extends Error {}

/** The state of one trajectory: what was shown, what is left of the budget. */
class Trajectory {
  readonly turns: Turn[] = []
  readonly #image: Tensor<'u8'>
  readonly #limits: Limits
  readonly #shown: ShownRegion[]
  readonly #boxes: EvidenceBox[] = []
  readonly #crops: Tensor<'u8'>[] = []
  #pixels: number
  #failed = 0

  constructor(image: Tensor<'u8'>, first: ShownRegion, limits: Limits) {
    this.#image = image
    this.#limits = limits
    this.#shown = [first]
    this.#pixels = first.height * first.width
  }

  /** Whether no further crop fits. */
  get spent(): boolean {
    return this.#limits.pixelBudget - this.#pixels < this.#limits.minPixels
  }

  /** A result for each call, in their order. */
  execute(calls: readonly ToolCall[], last: boolean): ToolResult[] {
    const results = calls.map((call, i): ToolResult => {
      const id = call.id === undefined ? {} : { id: call.id }
      try {
        if (i >= mostCalls) throw new NoCrop(`only ${mostCalls} calls at a time are executed`)
        const { text, image } = this.#zoom(call)
        return { ...id, text, images: [image] }
      } catch (error) {
        if (!(error instanceof NoCrop)) throw error
        this.#failed++
        return { ...id, text: `Error: ${error.message}.`, images: [] }
      }
    })
    if (!last && !this.spent) return results
    const end = results.at(-1)!
    return results.with(-1, {
      ...end,
      text: `${end.text} No further crop can be made: answer now.`,
    })
  }

  #zoom(call: ToolCall): { text: string; image: Tensor<'u8'> } {
    const { tool, coordinates, resizeRules: rules, minPixels, cropMaxPixels } = this.#limits
    if (call.name !== tool.name)
      throw new NoCrop(
        call.name === ''
          ? 'the call must be JSON with a name and arguments'
          : `there is no tool of this name; the only one is ${tool.name}`,
      )
    const { box, index } = this.#readArguments(call.arguments)
    const from = this.#shown[index]!
    const unit = coordinates === 'thousandths' ? { height: 1000, width: 1000 } : from
    const source = enlarged(sourceBox(box, from, unit), this.#image.shape)
    if (!source)
      throw new NoCrop(
        `the box is outside of image ${index}, whose coordinates go to ${unit.width} and ${unit.height}`,
      )
    if (!isResizable(source, { maxPixels: cropMaxPixels })) throw new NoCrop('the box is too thin')
    if (this.spent) throw new NoCrop('the budget of pixels is spent')
    const left = this.#limits.pixelBudget - this.#pixels
    const region: Region = sized(source, minPixels, Math.min(cropMaxPixels, left), rules)
    const { height, width } = region
    // The smallest side of a thin crop may exceed what is left.
    if (height * width > left) throw new NoCrop('the budget of pixels is spent')
    const [image] = resample({ images: [this.#image], regions: [region] }, 'zoom')
    this.#crops.push(image!)
    this.#shown.push({ box: source, height, width })
    this.#boxes.push(this.#evidenceBox(source))
    this.#pixels += height * width
    return { text: `Image ${this.#shown.length - 1}, a region of image ${index}.`, image: image! }
  }

  #readArguments(text: string): { box: readonly number[]; index: number } {
    const given = jsonOf(text)
    if (!isJsonObject(given)) throw new NoCrop('the arguments must be a JSON object')
    const { bbox_2d: named, bbox, img_idx: index = 0 } = given
    const raw = named ?? bbox
    const box: unknown = typeof raw === 'string' ? jsonOf(raw) : raw
    if (!Array.isArray(box) || box.length !== 4 || !box.every(Number.isFinite))
      throw new NoCrop('bbox_2d must be four numbers, [x1, y1, x2, y2]')
    const [x0, y0, x1, y1] = box as number[]
    if (x0! >= x1! || y0! >= y1!) throw new NoCrop('bbox_2d must have x1 < x2 and y1 < y2')
    if (typeof index !== 'number' || !Object.hasOwn(this.#shown, index))
      throw new NoCrop(`img_idx must be an integer from 0 to ${this.#shown.length - 1}`)
    return { box, index }
  }

  /** A region of the source in thousandths. */
  #evidenceBox([x0, y0, x1, y1]: PixelBox): EvidenceBox {
    const [height, width] = this.#image.shape as [number, number, number]
    const [x, y] = [width, height].map((size) => (c: number) => (c / size) * 1000)
    return { bbox2d: [x!(x0), y!(y0), x!(x1), y!(y1)], label: 'crop' }
  }

  end(last: Completion, how: Pick<Zooming, 'asked' | 'requests' | 'ended' | 'answer'>): Zooming {
    const { minPixels, maxPixels, cropMaxPixels, resizeRules: rules } = this.#limits
    const turns = this.turns.map(
      ({ completion, results }): Turn => ({
        completion,
        results: results.map((result) => ({ ...result, images: [] })),
      }),
    )
    const { tokens, untrainable } = packedTokens([...turns.map((t) => t.completion), last])
    const { tokens: _, logProbs: __, promptTokens: ___, ...said } = last
    const { promptTokens } = turns[0]?.completion ?? last
    return {
      ...how,
      completion: turns.length
        ? { ...said, ...tokens, ...(promptTokens && { promptTokens }) }
        : last,
      turns,
      shown: [...this.#shown],
      pixels: this.#pixels,
      failedCalls: this.#failed,
      ...(untrainable !== undefined && { untrainable }),
      evidence: evidenceOf(
        this.#image,
        this.#boxes,
        this.#shown.slice(1).map(({ box }) => box),
        { minPixels, maxPixels, cropMaxPixels, rules },
      ),
    }
  }

  /** Frees the crops, which no request needs any more. */
  free(): void {
    for (const crop of this.#crops) crop.dispose()
  }
}

/** A box of an image that is shown, in pixels of the source; undefined where it has no part of that image. */
function sourceBox(
  [a, b, c, d]: readonly number[],
  { box: [x0, y0, x1, y1] }: ShownRegion,
  unit: { height: number; width: number },
): PixelBox | undefined {
  const [x, y] = [(x1 - x0) / unit.width, (y1 - y0) / unit.height]
  const left = Math.max(x0, Math.floor(x0 + a! * x))
  const top = Math.max(y0, Math.floor(y0 + b! * y))
  const right = Math.min(x1, Math.ceil(x0 + c! * x))
  const bottom = Math.min(y1, Math.ceil(y0 + d! * y))
  return left < right && top < bottom ? [left, top, right, bottom] : undefined
}

/** The box with at least `leastSource` pixels a side, around its centre, where the image has them. */
function enlarged(box: PixelBox | undefined, shape: readonly number[]): PixelBox | undefined {
  if (!box) return undefined
  const side = (low: number, high: number, size: number): [number, number] => {
    const wanted = Math.min(size, Math.max(high - low, leastSource))
    const start = Math.max(0, Math.min(size - wanted, Math.round((low + high - wanted) / 2)))
    return high - low >= wanted ? [low, high] : [start, start + wanted]
  }
  const [x0, x1] = side(box[0], box[2], shape[1]!)
  const [y0, y1] = side(box[1], box[3], shape[0]!)
  return [x0, y0, x1, y1]
}

/**
 * The tokens of a trajectory behind its first prompt: each output's, and between them those that the next prompt has
 * behind the output before, which are of the tool's result and of the chat template.
 */
function packedTokens(outputs: readonly Completion[]): {
  tokens?: Required<Pick<Completion, 'tokens' | 'mask'>> & Pick<Completion, 'logProbs'>
  untrainable?: string
} {
  if (!outputs.every(({ tokens }) => tokens)) return {}
  const start = outputs[0]!.promptTokens
  const tokens: number[] = []
  const mask: number[] = []
  const logProbs: number[] = []
  for (const [turn, { tokens: own = [], promptTokens, logProbs: known }] of outputs.entries()) {
    if (turn > 0) {
      if (!start || !promptTokens)
        return {
          untrainable:
            'the server gives no ids of the prompt, which has the tokens of tool results',
        }
      const before = [...start, ...tokens]
      if (promptTokens.length < before.length || before.some((id, i) => promptTokens[i] !== id))
        return {
          untrainable: `the prompt of turn ${turn + 1} does not begin with the tokens of turn ${turn}: the server's chat template renders them in another way`,
        }
      for (const id of promptTokens.slice(before.length)) {
        tokens.push(id)
        mask.push(0)
        logProbs.push(0)
      }
    }
    for (const [i, id] of own.entries()) {
      tokens.push(id)
      mask.push(1)
      logProbs.push(known?.[i] ?? Number.NaN)
    }
  }
  const all = outputs.every((output) => output.logProbs)
  return { tokens: { tokens, mask, ...(all && { logProbs }) } }
}
