import type { Coordinates, EvidenceOptions } from '../p2r/evidence.js'
import { OpenAIPolicy } from '../p2r/openai.js'
import { Perceiver } from '../p2r/perceiver.js'
import { Reasoner } from '../p2r/reasoner.js'
import { modelVerifier, type RewardRules, type Verifier } from '../p2r/reward.js'
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
}

export function evidenceOptions(options: CropOptions): EvidenceOptions {
  const { maxPixels, minPixels, maxEvidence, padding, resizeRules, coordinates } = options
  const square = [padding, padding] as const
  return { maxPixels, minPixels, maxEvidence, padding: square, rules: resizeRules, coordinates }
}

export async function rolesOf(
  options: RoleOptions,
): Promise<{ perceiver: Perceiver; reasoner: Reasoner }> {
  const { temperature, rules } = options
  const [perceiving, reasoning] = [
    await served('perceiver', options),
    await served('reasoner', options),
  ]
  return {
    perceiver: new Perceiver(perceiving, {
      temperature,
      boxRules: rules,
      ...evidenceOptions(options),
    }),
    reasoner: new Reasoner(reasoning, { temperature, rules }),
  }
}

export async function verifierOf(options: RoleOptions): Promise<Verifier> {
  return modelVerifier(await served('verifier', options), { rules: options.rules })
}

type Part = 'perceiver' | 'reasoner' | 'verifier'

async function served(part: Part, options: RoleOptions): Promise<OpenAIPolicy> {
  const baseURL = options[`${part}Url`] ?? options.baseUrl
  if (!baseURL)
    throw new UsageError(`the ${part} needs --base-url, where its server is, or --${part}-url`)
  const apiKey = options.apiKey ?? process.env.OPENAI_API_KEY
  const model =
    options[`${part}Model`] ?? options.model ?? (await onlyModel(baseURL[0]!, part, apiKey))
  return new OpenAIPolicy({
    baseURL,
    model,
    ...(apiKey && { apiKey }),
    timeoutMs: 1000 * options.timeout,
    maxRetries: options.retries,
    concurrency: options.concurrency,
    imageFormat: options.imageFormat,
    tokens: false,
  })
}

/** The model of a server that serves only one. */
async function onlyModel(url: string, part: Part, apiKey: string | undefined): Promise<string> {
  const name = `name the model by --model or --${part}-model`
  let models: unknown
  try {
    const response = await fetch(`${url.replace(/\/$/, '')}/models`, {
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
