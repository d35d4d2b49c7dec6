import { statSync } from 'node:fs'
import { SingleBar } from 'cli-progress'
import type { Device } from '../device.js'
import { Qwen3VL } from '../models/qwen3_vl/model.js'
import type { Answerer } from '../p2r/answer.js'
import type { Coordinates, EvidenceOptions } from '../p2r/evidence.js'
import { LocalPolicy } from '../p2r/local.js'
import { fetchWithin, OpenAIPolicy } from '../p2r/openai.js'
import { Perceiver } from '../p2r/perceiver.js'
import type { Policy } from '../p2r/policy.js'
import { Reasoner } from '../p2r/reasoner.js'
import { type ReproductionSettings, reproductionSettings } from '../p2r/reproduction.js'
import { modelVerifier, type RewardRules, type Verifier } from '../p2r/reward.js'
import { ZoomAgent } from '../p2r/zoom.js'
import { UsageError } from './usage.js'

/** The command line's options of images and the regions cut out of them. */
export interface CropOptions {
  maxPixels: number
  minPixels: number
  maxEvidence: number
  padding: number
  resizeRules: NonNullable<EvidenceOptions['rules']>
  coordinates: Coordinates
  autoOrient: boolean
}

/** The command line's options of the served models. */
export interface RoleOptions extends CropOptions, LoadOptions {
  baseUrl?: string[]
  model?: string
  perceiverUrl?: string[]
  perceiverModel?: string
  reasonerUrl?: string[]
  reasonerModel?: string
  verifierUrl?: string[]
  verifierModel?: string
  apiKey?: string
  timeout: number
  retries: number
  concurrency: number
  temperature: number
  imageFormat: 'jpeg' | 'png'
  rules: RewardRules
  stream?: boolean
  thinking: boolean
  reproduction?: boolean
  pixelBudget?: number
  maxTurns: number
  toolCalls: 'api' | 'text'
}

/** How questions are answered: by a perceiver and a reasoner, or by an agent in several turns. */
export const methods = ['two-stage', 'zoom'] as const
export type Method = (typeof methods)[number]

/** Who answers, and where they are served. */
export interface Roles {
  answerer: Answerer
  servers: Partial<Record<'perceiver' | 'reasoner', Server>>
}

/** Where a part is served; without a URL, a checkpoint's folder. */
export interface Server {
  url: string[]
  model: string
}

export function evidenceOptions(options: CropOptions): EvidenceOptions {
  const { maxPixels, minPixels, maxEvidence, padding, resizeRules, coordinates } = options
  const square = [padding, padding] as const
  return { maxPixels, minPixels, maxEvidence, padding: square, rules: resizeRules, coordinates }
}

/** How a checkpoint is loaded. */
export interface LoadOptions {
  quantize?: '8' | '4'
}

/** The models of checkpoints' folders, each loaded once. */
export class LocalModels {
  readonly #device: Device
  readonly #options: LoadOptions
  readonly #loaded = new Map<string, Promise<Qwen3VL>>()

  constructor(device: Device, options: LoadOptions) {
    this.#device = device
    this.#options = options
  }

  load(folder: string): Promise<Qwen3VL> {
    const known = this.#loaded.get(folder)
    if (known) return known
    const model = loadModel(folder, this.#device, this.#options)
    this.#loaded.set(folder, model)
    return model
  }
}

/** Loads a checkpoint, with a progress bar where somebody sees it. */
export async function loadModel(
  folder: string,
  device: Device,
  { quantize }: LoadOptions,
): Promise<Qwen3VL> {
  if (!statSync(folder, { throwIfNoEntry: false })?.isDirectory())
    throw new UsageError(
      `--model ${folder} is not a checkpoint's folder; where a server has the model, name that by --base-url`,
    )
  const format = 'loading {bar} {percentage} %  {eta_formatted} left'
  const bar = new SingleBar({ format, barsize: 24, hideCursor: true, clearOnComplete: true })
  bar.start(1, 0)
  try {
    return await Qwen3VL.load(folder, device, {
      ...(quantize && { quantize: Number(quantize) as 8 | 4 }),
      onProgress(done, of) {
        bar.setTotal(of)
        bar.update(done)
      },
    })
  } finally {
    bar.stop()
  }
}

export async function rolesOf(
  given: RoleOptions,
  models: LocalModels,
  method: Method,
  seed?: number,
): Promise<Roles> {
  const options = withinBudget(given)
  const { temperature, rules } = options
  const settings = options.reproduction ? reproductionSettings() : undefined
  const policy = (server: Server) => policyOf(server, options, models, settings, seed)
  const reasoner = await serverOf('reasoner', options)
  if (method === 'zoom') {
    const { maxTurns, coordinates, resizeRules } = options
    const { minPixels, maxPixels } = settings?.perceiver ?? options
    // A model that is run here writes its calls.
    const toolCalls = reasoner.url.length ? options.toolCalls : 'text'
    const agent = new ZoomAgent(await policy(reasoner), {
      temperature,
      rules,
      maxTurns,
      toolCalls,
      coordinates,
      resizeRules,
      minPixels,
      maxPixels,
      pixelBudget: options.pixelBudget ?? imagesOf(options) * maxPixels,
      ...settings?.reasoner,
    })
    return { answerer: { agent }, servers: { reasoner } }
  }
  const perceiver = await serverOf('perceiver', options)
  return {
    servers: { perceiver, reasoner },
    answerer: {
      perceiver: new Perceiver(await policy(perceiver), {
        temperature,
        boxRules: rules,
        ...evidenceOptions(options),
        ...settings?.perceiver,
      }),
      reasoner: new Reasoner(await policy(reasoner), {
        temperature,
        rules,
        ...settings?.reasoner,
      }),
    },
  }
}

/** Images that the two-stage form shows at most: the perceiver's, the annotated one, and the crops. */
function imagesOf({ maxEvidence }: CropOptions): number {
  return 2 + maxEvidence
}

/** The options with images that fit a budget: the largest is an equal share of it, in both methods. */
function withinBudget(options: RoleOptions): RoleOptions {
  const { pixelBudget, minPixels } = options
  if (pixelBudget === undefined) return options
  const share = Math.floor(pixelBudget / imagesOf(options))
  if (share < minPixels)
    throw new UsageError(
      `--pixel-budget must be at least ${imagesOf(options)} times --min-pixels, ${imagesOf(options) * minPixels}`,
    )
  return { ...options, maxPixels: Math.min(options.maxPixels, share) }
}

export async function verifierOf(
  options: RoleOptions,
  models: LocalModels,
): Promise<{ verifier: Verifier; server: Server }> {
  const server = await serverOf('verifier', options)
  const policy = await policyOf(server, options, models)
  return { server, verifier: modelVerifier(policy, { rules: options.rules }) }
}

type Part = 'perceiver' | 'reasoner' | 'verifier'

async function serverOf(part: Part, options: RoleOptions): Promise<Server> {
  const url = options[`${part}Url`] ?? options.baseUrl
  const named = options[`${part}Model`] ?? options.model
  if (!url && named !== undefined) return { url: [], model: named }
  if (!url)
    throw new UsageError(
      `the ${part} needs --base-url, where its server is, or --${part}-url, or --model, a checkpoint's folder`,
    )
  return { url, model: named ?? (await onlyModel(url[0]!, part, apiKeyOf(options))) }
}

function apiKeyOf({ apiKey }: RoleOptions): string | undefined {
  return apiKey ?? process.env.OPENAI_API_KEY
}

async function policyOf(
  { url, model }: Server,
  options: RoleOptions,
  models: LocalModels,
  settings?: ReproductionSettings,
  seed?: number,
): Promise<Policy> {
  if (!url.length)
    return new LocalPolicy(await models.load(model), {
      ...(settings && { sampling: settings.sampling }),
      ...(seed !== undefined && { seed }),
    })
  const extraBody = { ...settings?.policy.extraBody, ...(seed !== undefined && { seed }) }
  const apiKey = apiKeyOf(options)
  return new OpenAIPolicy({
    baseURL: url,
    model,
    ...(apiKey && { apiKey }),
    timeoutMs: 1000 * options.timeout,
    maxRetries: options.retries,
    concurrency: options.concurrency,
    imageFormat: options.imageFormat,
    ...(options.stream && { stream: true }),
    ...(!options.thinking && { thinking: false }),
    tokens: false,
    ...settings?.policy,
    extraBody,
  })
}

/** The model of a server that serves only one. */
async function onlyModel(url: string, part: Part, apiKey: string | undefined): Promise<string> {
  const name = `name the model by --model or --${part}-model`
  let models: unknown
  try {
    const response = await fetchWithin(`${url.replace(/\/$/, '')}/models`, {
      headers: apiKey ? { authorization: `Bearer ${apiKey}` } : {},
      signal: AbortSignal.timeout(10_000),
    })
    models = ((await response.json()) as { data?: unknown }).data
  } catch (cause) {
    throw new Error(`${url} does not list its models; ${name}`, { cause })
  }
  const ids = Array.isArray(models) ? models.map(({ id }) => id).filter((id) => id) : []
  if (ids.length !== 1)
    throw new UsageError(`${url} serves ${ids.length ? ids.join(', ') : 'no model'}; ${name}`)
  return String(ids[0])
}
