// The arguments of Qwen3VL's `generate` and `stream`, and what the scheduler makes of them.
import { type AbortSignalLike, checkSignal, onAbort } from '../../abort.js'
import {
  checkArguments,
  checkArray,
  checkBoolean,
  checkInteger,
  checkIntegerWithin,
  checkNonNegative,
  checkPositive,
  checkText,
  describeValue,
  isObject,
  type Names,
} from '../../arguments.js'
import { refuse } from '../../errors.js'
import type { Ints } from '../../tensor.js'
import type { VisionTower } from '../../vision/tower.js'
import type { Qwen3VLConfig, Qwen3VLSampling } from './config.js'
import { checkPacked, checkTokens, type Vision } from './prompt.js'
import { contentSeed, type Job, type Sampling } from './scheduler.js'
import { StopTexts } from './stop.js'
import type { Qwen3VLTokenizer } from './tokens.js'

/** A prompt to continue. */
export interface GenerationPrompt {
  /** Token ids, one placeholder a merged patch among them. */
  tokens: Ints
  /**
   * The images, in the order of their placeholders. They are read until the promise settles.
   * @default none
   */
  images?: Vision
  /**
   * The videos, in the order of their placeholders.
   * @default none
   */
  videos?: Vision
}

/** How tokens are drawn, in the order in which the filters apply. */
export interface SamplingOptions {
  /**
   * Greater than 0: divides the logits of tokens that the sequence has where they are positive, multiplies them where
   * they are negative.
   * @default 1, which changes nothing
   */
  repetitionPenalty?: number
  /**
   * Divides the logits, at least 0; 0 takes the most probable token.
   * @default 1
   */
  temperature?: number
  /**
   * Only the k most probable tokens are drawn.
   * @default 0: all
   */
  topK?: number
  /**
   * Only the most probable tokens are drawn, as many as it takes for their probabilities to reach p; 0 < p ≤ 1.
   * @default 1: all
   */
  topP?: number
  /**
   * Only tokens are drawn whose probability is at least this share of the most probable one's; from 0 to 1.
   * @default 0: all
   */
  minP?: number
  /**
   * Subtracted from the logits of tokens that the continuation has; the prompt's do not count.
   * @default 0
   */
  presencePenalty?: number
  /**
   * Subtracted from the logits of tokens as often as the continuation has them.
   * @default 0
   */
  frequencyPenalty?: number
  /**
   * Added to the logits of tokens, by their ids: -Infinity forbids one.
   * @default none
   */
  logitBias?: Readonly<Record<number, number>>
}

/** The arguments of Qwen3VL's `generate`. */
export interface Qwen3VLGenerateArgs extends SamplingOptions {
  /** The prompts. */
  prompts: readonly GenerationPrompt[]
  /**
   * Continuations of each prompt, which is computed once for all of them.
   * @default 1
   */
  n?: number
  /** Tokens of a continuation at most. */
  maxTokens: number
  /**
   * An integer from 0 to 2^53 - 1. The same prompt with the same seed gives the same continuations, whatever else is
   * computed at once; another place among the n, and a repeated prompt, other ones.
   * @default 0
   */
  seed?: number
  /**
   * The tokens that end a continuation, which has them as its last; [] for none.
   * @default those of the checkpoint
   */
  stopTokens?: Ints
  /**
   * Texts that end a continuation as soon as it has one. Needs the checkpoint's tokenizer.
   * @default none
   */
  stop?: readonly string[]
  /**
   * Whether log-probabilities are wanted.
   * @default true
   */
  logProbs?: boolean
  /**
   * How many of the most probable tokens are told in each place, from 0 to 64; needs `logProbs`.
   * @default 0
   */
  topLogProbs?: number
  /**
   * Of what temperature the log-probabilities are; greater than 0.
   * @default that of sampling, or 1 where that is 0
   */
  logProbsTemperature?: number
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/** A continuation of a prompt. */
export interface Generated {
  /** Its token ids, with the one that ended it. */
  tokens: number[]
  /**
   * The log-probability of each, in nats, at `logProbsTemperature` and without filters: on the CPU bit for bit those of
   * `logProbs` of the whole sequence. Empty where they are not wanted.
   */
  logProbs: number[]
  /** In each place the most probable tokens, by falling log-probability; absent where they are not wanted. */
  topLogProbs?: TokenLogProb[][]
  /** Whether a stop token or text ended it, or `maxTokens`. */
  finishReason: 'stop' | 'length'
}

/** A token that could have been drawn. */
export interface TokenLogProb {
  /** Its id. */
  token: number
  /** As of `Generated`. */
  logProb: number
}

/** A step of a continuation, from Qwen3VL's `stream`. */
export interface GeneratedToken {
  /** Which of the prompts. */
  prompt: number
  /** Which of its n continuations. */
  index: number
  /** The token's id. */
  token: number
  /** As of `Generated`; undefined where they are not wanted. */
  logProb?: number
  /** The most probable tokens in this place, where they are wanted. */
  topLogProbs?: TokenLogProb[]
  /** With the last token: why it is that. */
  finishReason?: 'stop' | 'length'
}

const promptNames: Names<GenerationPrompt> = { tokens: true, images: true, videos: true }
export const samplingNames: Names<SamplingOptions> = {
  repetitionPenalty: true,
  temperature: true,
  topK: true,
  topP: true,
  minP: true,
  presencePenalty: true,
  frequencyPenalty: true,
  logitBias: true,
}
const generateNames: Names<Qwen3VLGenerateArgs> = {
  ...samplingNames,
  prompts: true,
  n: true,
  maxTokens: true,
  seed: true,
  stopTokens: true,
  stop: true,
  logProbs: true,
  topLogProbs: true,
  logProbsTemperature: true,
  signal: true,
}

/** The jobs of a call, one a prompt; and its stop texts. */
export function jobsOf(
  a: Qwen3VLGenerateArgs,
  model: { config: Qwen3VLConfig; tower: VisionTower; sampling: Qwen3VLSampling },
  op: string,
): { jobs: Job[]; stop: readonly string[] } {
  a = checkArguments(a, generateNames, op)
  const { config, tower } = model
  const n = checkIntegerWithin(a.n ?? 1, 1, 2 ** 16, 'n', op)
  const maxTokens = checkPositive(a.maxTokens, 'maxTokens', op)
  const seed = checkInteger(a.seed ?? 0, 0, 'seed', op)
  const stopTokens = new Set(
    checkTokens(a.stopTokens ?? model.sampling.stopTokens, 'stopTokens', config.vocabSize, op),
  )
  const stop = checkArray(a.stop ?? [], 'stop', op)
  stop.forEach((text, i) => {
    checkText(text, `stop[${i}]`, op)
  })
  const sampling = checkSamplingOptions(a, op, config.vocabSize)
  const logProbs = checkBoolean(a.logProbs ?? true, 'logProbs', op)
  const topLogProbs = checkIntegerWithin(a.topLogProbs ?? 0, 0, 64, 'topLogProbs', op)
  if (topLogProbs && !logProbs) refuse('ERR_VALUE', op, 'topLogProbs needs logProbs')
  const scale = a.logProbsTemperature ?? (sampling.temperature || 1)
  if (!(checkNonNegative(scale, 'logProbsTemperature', op) > 0))
    refuse('ERR_VALUE', op, 'logProbsTemperature must be greater than 0, got 0')
  const signal = checkSignal(a.signal, op)
  signal?.throwIfAborted()
  const seen = new Map<string, number>()
  const jobs = checkArray(a.prompts, 'prompts', op).map((given, i): Job => {
    const { tokens, images, videos } = checkArguments(given, promptNames, op, `prompts[${i}]`)
    const ids = checkTokens(tokens, `prompts[${i}].tokens`, config.vocabSize, op)
    if (!ids.length) refuse('ERR_VALUE', op, `prompts[${i}].tokens must have at least one token`)
    if (ids.length + maxTokens > config.maxPositions)
      refuse(
        'ERR_VALUE',
        op,
        `prompts[${i}] has ${ids.length} tokens, and with maxTokens ${maxTokens} more than the model's context of ${config.maxPositions}`,
      )
    const prompt = checkPacked(
      {
        tokens: ids,
        cuSeqlens: [0, ids.length],
        ...(images && { images }),
        ...(videos && { videos }),
      },
      config,
      tower,
      op,
    )
    const content = String(ids)
    const repeat = seen.get(content) ?? 0
    seen.set(content, repeat + 1)
    return {
      prompt,
      n,
      maxTokens,
      sampling,
      seed: contentSeed(seed, ids, repeat),
      stopTokens,
      logProbs,
      topLogProbs: Math.min(topLogProbs, config.vocabSize),
      logProbsTemperature: scale,
      signal,
    }
  })
  return { jobs, stop }
}

/** vocabSize: of the model, where it is known. */
export function checkSamplingOptions(
  a: SamplingOptions,
  op: string,
  vocabSize: number = 2 ** 31,
): Sampling {
  const { temperature = 1, topK = 0, topP = 1, minP = 0, repetitionPenalty = 1 } = a
  checkNonNegative(temperature, 'temperature', op)
  checkInteger(topK, 0, 'topK', op)
  const within = (value: number, name: string, open: boolean): void => {
    if (typeof value !== 'number' || !(open ? value > 0 : value >= 0) || value > 1)
      refuse(
        'ERR_VALUE',
        op,
        `${name} must be a number ${open ? 'greater than 0 and at most' : 'from 0 to'} 1, got ${describeValue(value)}`,
      )
  }
  within(topP, 'topP', true)
  within(minP, 'minP', false)
  if (typeof repetitionPenalty !== 'number' || !(repetitionPenalty > 0 && repetitionPenalty < 1e6))
    refuse(
      'ERR_VALUE',
      op,
      `repetitionPenalty must be a number greater than 0, got ${describeValue(repetitionPenalty)}`,
    )
  const { presencePenalty = 0, frequencyPenalty = 0, logitBias = {} } = a
  for (const [name, value] of Object.entries({ presencePenalty, frequencyPenalty }))
    if (!Number.isFinite(value))
      refuse('ERR_VALUE', op, `${name} must be a finite number, got ${describeValue(value)}`)
  if (!isObject(logitBias) || Array.isArray(logitBias))
    refuse('ERR_VALUE', op, `logitBias must be an object, got ${describeValue(logitBias)}`)
  const bias = Object.entries(logitBias).map(([key, value]) => {
    const token = Number(key)
    if (!Number.isInteger(token) || token < 0 || token >= vocabSize)
      refuse('ERR_VALUE', op, `logitBias has '${key}', which is no token id below ${vocabSize}`)
    if (typeof value !== 'number' || !(value < Number.POSITIVE_INFINITY))
      refuse('ERR_VALUE', op, `logitBias[${key}] must be a number, got ${describeValue(value)}`)
    return [token, value] as const
  })
  return {
    temperature,
    topK,
    topP,
    minP,
    repetitionPenalty,
    presencePenalty,
    frequencyPenalty,
    logitBias: new Map(bias),
  }
}

/** What ends a continuation whose text has one of the stop texts. */
export function stopper(
  job: Job,
  stop: readonly string[],
  tokenizer: Qwen3VLTokenizer | undefined,
): Job['onToken'] {
  if (!tokenizer) return undefined
  const rows = Array.from({ length: job.n }, () => ({
    text: tokenizer.stream(),
    stop: new StopTexts(stop),
  }))
  return (row, token) => {
    const { text, stop } = rows[row]!
    stop.push(text.push(token))
    return stop.stopped
  }
}

/** The tokens of jobs as they are drawn. */
export async function* streamed(
  jobs: readonly Job[],
  submit: (jobs: readonly Job[]) => Promise<Generated[][]>,
): AsyncGenerator<GeneratedToken, void, undefined> {
  const left = new AbortController()
  const [signal] = jobs.map((job) => job.signal)
  const forget = onAbort(signal, () => left.abort(signal!.reason))
  let made: GeneratedToken[] = []
  let wake = (): void => {}
  let done = false
  let failure: { error: unknown } | undefined
  const follow = (job: Job, prompt: number): Job => {
    const told = Array.from({ length: job.n }, () => 0)
    return {
      ...job,
      signal: left.signal,
      onStep(rollouts) {
        rollouts.forEach(({ tokens, logProbs, topLogProbs, done, finishReason }, index) => {
          for (; told[index]! < tokens.length; told[index]!++) {
            const at = told[index]!
            const logProb = logProbs[at]
            made.push({
              prompt,
              index,
              token: tokens[at]!,
              ...(logProb !== undefined && { logProb }),
              ...(topLogProbs && { topLogProbs: topLogProbs[at]! }),
              ...(done && at === tokens.length - 1 && { finishReason }),
            })
          }
        })
        wake()
      },
    }
  }
  const all = submit(jobs.map(follow))
    .catch((error: unknown) => {
      failure = { error }
    })
    .finally(() => {
      done = true
      wake()
    })
  try {
    for (;;) {
      const ready = made
      made = []
      yield* ready
      if (failure) throw failure.error
      if (made.length) continue
      if (done) return
      await new Promise<void>((resolve) => {
        wake = resolve
      })
    }
  } finally {
    forget()
    left.abort(new Error('the stream was left'))
    await all
  }
}
