import type { Answerer } from '../p2r/answer.js'
import type { Coordinates, EvidenceOptions } from '../p2r/evidence.js'
import { fetchWithin, OpenAIPolicy, type OpenAIPolicyOptions } from '../p2r/openai.js'
import { Perceiver } from '../p2r/perceiver.js'
import { Reasoner } from '../p2r/reasoner.js'
import { reproductionSettings } from '../p2r/reproduction.js'
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
export interface RoleOptions extends CropOptions {
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

/** Where a part is served. */
export interface Server {
  url: string[]
  model: string
}

export function evidenceOptions(options: CropOptions): EvidenceOptions {
  const { maxPixels, minPixels, maxEvidence, padding, resizeRules, coordinates } = options
  const square = [padding, padding] as const
  return { maxPixels, minPixels, maxEvidence, padding: square, rules: resizeRules, coordinates }
}

export async function rolesOf(given: RoleOptions, method: Method, seed?: number): Promise<Roles> {
  const options = withinBudget(given)
  const { temperature, rules } = options
  const settings = options.reproduction ? reproductionSettings() : undefined
  const extraBody = { ...settings?.policy.extraBody, ...(seed !== undefined && { seed }) }
  const policy = { ...settings?.policy, extraBody }
  const reasoner = await serverOf('reasoner', options)
  if (method === 'zoom') {
    const { maxTurns, toolCalls, coordinates, resizeRules } = options
    const { minPixels, maxPixels } = settings?.perceiver ?? options
    const agent = new ZoomAgent(policyOf(reasoner, options, policy), {
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
      perceiver: new Perceiver(policyOf(perceiver, options, policy), {
        temperature,
        boxRules: rules,
        ...evidenceOptions(options),
        ...settings?.perceiver,
      }),
      reasoner: new Reasoner(policyOf(reasoner, options, policy), {
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
): Promise<{ verifier: Verifier; server: Server }> {
  const server = await serverOf('verifier', options)
  return { server, verifier: modelVerifier(policyOf(server, options), { rules: options.rules }) }
}

type Part = 'perceiver' | 'reasoner' | 'verifier'

async function serverOf(part: Part, options: RoleOptions): Promise<Server> {
  const url = options[`${part}Url`] ?? options.baseUrl
  if (!url)
    throw new UsageError(`the ${part} needs --base-url, where its server is, or --${part}-url`)
  const named = options[`${part}Model`] ?? options.model
  return { url, model: named ?? (await onlyModel(url[0]!, part, apiKeyOf(options))) }
}

function apiKeyOf({ apiKey }: RoleOptions): string | undefined {
  return apiKey ?? process.env.OPENAI_API_KEY
}

function policyOf(
  { url, model }: Server,
  options: RoleOptions,
  more: Partial<OpenAIPolicyOptions> = {},
): OpenAIPolicy {
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
    ...more,
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
