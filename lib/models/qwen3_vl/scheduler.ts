/**
 * Generation by continuous batching (Yu et al., Orca, 2022) over a paged key/value cache (Kwon et al., vLLM, 2023).
 *
 * A lane is a sequence on its way through the cache: first a prompt, and when all of its tokens are cached, one lane
 * for each of its rollouts, which share the prompt's pages. A step takes the lanes that have one new token, fills up
 * with parts of prompts, runs them packed through the model, and draws a token for each lane whose tokens are all
 * cached. Lanes come and go between steps. A lane that finds no free page waits for others to finish; if none can go
 * on, the youngest gives its pages back and is computed again later.
 *
 * A lane's results do not depend on the others: kernels compute a row's bits from its own sequence alone, and the
 * random numbers of a draw follow from the request, not from the batch. Log-probabilities are those of the logits that
 * the draw is from, before anything is masked or biased, and on the CPU the bits of the head without logits.
 */
import { type AbortSignalLike, onAbort } from '../../abort.js'
import { composite } from '../../composite.js'
import { P2RError, refuse } from '../../errors.js'
import { cachedAttention, type KvCache } from '../../ops/cached_attention.js'
import { tokenLogProbs } from '../../ops/log_probs.js'
import { gatherRows, scatterAddRows } from '../../ops/rows.js'
import { sampleTokens } from '../../ops/sampling.js'
import { scope, unscoped } from '../../scope.js'
import type { Tensor } from '../../tensor.js'
import type { Decoder, Placement } from './decoder.js'
import type { Packed } from './prompt.js'

/** How tokens are drawn. */
export interface Sampling {
  temperature: number
  topK: number
  topP: number
  minP: number
  repetitionPenalty: number
  presencePenalty: number
  frequencyPenalty: number
  logitBias: ReadonlyMap<number, number>
}

/** One continuation of a prompt. */
export interface Rollout {
  tokens: number[]
  logProbs: number[]
  topLogProbs?: { token: number; logProb: number }[][]
  finishReason: 'stop' | 'length'
}

/** A continuation that may go on. */
export interface RolloutSoFar extends Rollout {
  done: boolean
}

/** A prompt to continue. */
export interface Job {
  prompt: Packed
  /** How many continuations. */
  n: number
  /** Of each, at most. */
  maxTokens: number
  sampling: Sampling
  /** Two words, from which the random numbers of all draws follow. */
  seed: readonly [number, number]
  stopTokens: ReadonlySet<number>
  logProbs: boolean
  /** How many of the most probable tokens are told in each place. */
  topLogProbs: number
  logProbsTemperature: number
  signal?: AbortSignalLike | undefined
  /** Called for each token; true ends its continuation. */
  onToken?: ((row: number, token: number) => boolean) | undefined
  /** Called after a step that made tokens of this job, with all so far. */
  onStep?: ((rollouts: readonly RolloutSoFar[]) => void) | undefined
}

/** Where the tokens of prompts come from and go to. */
interface Model {
  decoder: Decoder
  op: string
  /** The features of a prompt's images and videos. */
  place: (prompt: Packed) => Placement[]
  cache: () => KvCache
  cacheTokens: number
}

/** Tokens of a step; of a longer prompt only a part. */
const chunk = 512
/** Lanes at once. */
const maxLanes = 256
class Running {
  readonly job: Job
  readonly rollouts: RolloutSoFar[]
  readonly settle: { resolve: (made: Rollout[]) => void; reject: (reason: unknown) => void }
  placements: Placement[] | undefined
  ended = false
  forget: () => void = () => {}

  constructor(job: Job, settle: Running['settle']) {
    this.job = job
    this.settle = settle
    this.rollouts = Array.from({ length: job.n }, () => ({
      tokens: [],
      logProbs: [],
      ...(job.topLogProbs > 0 && { topLogProbs: [] }),
      finishReason: 'length',
      done: false,
    }))
  }
}

interface Lane {
  running: Running
  /** The continuation that this is; undefined for the prompt of all. */
  row: number | undefined
  tokens: number[]
  /** In the cache; undefined before the first token is there. */
  sequence: number | undefined
  cached: number
}

/** A rollout's next token, from a row of the step's logits. */
interface Draw {
  lane: Lane
  row: number
  state: number
}

export class Scheduler {
  readonly #model: Model
  #cache: KvCache | undefined
  #waiting: Lane[] = []
  #lanes: Lane[] = []
  #looping = false
  #disposed = false

  constructor(model: Model) {
    this.#model = model
  }

  /** Continues a prompt beside all others that are under way. */
  submit(job: Job): Promise<Rollout[]> {
    const { op, cacheTokens } = this.#model
    job.signal?.throwIfAborted()
    if (this.#disposed) refuse('ERR_DISPOSED', op, 'the model was disposed')
    const { length } = job.prompt.tokens
    if (length + 1 > cacheTokens)
      refuse(
        'ERR_MEMORY',
        op,
        `a prompt of ${length} tokens does not fit into the cache of ${cacheTokens}`,
      )
    return new Promise((resolve, reject) => {
      const running = new Running(job, { resolve, reject })
      running.forget = onAbort(job.signal, () => this.#end(running, job.signal?.reason))
      const tokens = [...job.prompt.tokens]
      const row = job.n === 1 ? 0 : undefined
      this.#waiting.push({ running, row, tokens, sequence: undefined, cached: 0 })
      if (this.#looping) return
      this.#looping = true
      // Requests of the same turn of the event loop begin in one step, outside of the caller's scopes.
      unscoped(() => setImmediate(() => void this.#loop()))
    })
  }

  /** Ends all requests, and frees the cache. */
  dispose(): void {
    this.#disposed = true
    const gone = new P2RError('ERR_DISPOSED', `[${this.#model.op}] the model was disposed`, {
      op: this.#model.op,
    })
    for (const { running } of [...this.#waiting, ...this.#lanes]) this.#end(running, gone)
    this.#cache?.dispose()
    this.#cache = undefined
  }

  async #loop(): Promise<void> {
    while (this.#waiting.length + this.#lanes.length > 0) {
      let lanes = [...this.#lanes, ...this.#waiting]
      try {
        const batch = this.#choose()
        lanes = batch.map(({ lane }) => lane)
        if (batch.length) await this.#step(batch)
        else this.#makeRoom()
      } catch (error) {
        for (const { running } of lanes) this.#end(running, error)
      }
    }
    this.#looping = false
  }

  /** The lanes of the next step, each with how many of its tokens. */
  #choose(): { lane: Lane; count: number }[] {
    this.#cache ??= this.#model.cache()
    const cache = this.#cache
    let free = cache.pagesFree
    let room = chunk
    const batch: { lane: Lane; count: number }[] = []
    const take = (lane: Lane): void => {
      const count = fitting(cache, lane, free, Math.min(lane.tokens.length - lane.cached, room))
      if (count < 1) return
      free -= pagesFor(cache, lane, count)
      room -= count
      batch.push({ lane, count })
    }
    const isNext = (lane: Lane): boolean => lane.tokens.length - lane.cached === 1
    for (const lane of this.#lanes) if (isNext(lane)) take(lane)
    for (const lane of this.#lanes) if (!isNext(lane)) take(lane)
    while (this.#waiting.length && room > 0 && this.#lanes.length < maxLanes) {
      const lane = this.#waiting[0]!
      // One that could not go on to the end of its tokens would only hold pages.
      if (pagesFor(cache, lane, lane.tokens.length) > free) break
      this.#waiting.shift()
      if (!this.#admit(lane)) continue
      this.#lanes.push(lane)
      take(lane)
    }
    return batch
  }

  /** Encodes the images and videos of a prompt that comes for the first time. */
  #admit({ running }: Lane): boolean {
    try {
      running.placements ??= this.#model.place(running.job.prompt)
      return true
    } catch (error) {
      this.#end(running, error)
      return false
    }
  }

  /** No lane can go on: the youngest gives back its pages; one alone has filled the cache. */
  #makeRoom(): void {
    const lane = this.#lanes.at(-1) ?? this.#waiting[0]
    if (!lane) return
    if (this.#lanes.length > 1) {
      this.#lanes.pop()
      this.#release(lane)
      this.#waiting.unshift(lane)
      return
    }
    const { op, cacheTokens } = this.#model
    const message = `the cache of ${cacheTokens} tokens is full after ${lane.cached} of this request`
    this.#end(lane.running, new P2RError('ERR_MEMORY', `[${op}] ${message}`, { op }))
  }

  async #step(batch: readonly { lane: Lane; count: number }[]): Promise<void> {
    const cache = this.#cache!
    const { decoder, op } = this.#model
    const pass = packedPass(batch)
    const sequences = batch.map(({ lane }) => {
      lane.sequence ??= cache.add()
      return lane.sequence
    })
    const whole = batch.filter(({ lane, count }) => lane.cached + count === lane.tokens.length)
    const { final, ...rows } = composite(op, () =>
      scope(() => {
        const made = decoder.run({
          ...pass,
          attend: (layer, q, k, v) =>
            cachedAttention({ q, k, v, cuSeqlens: pass.cuSeqlens, cache, layer, sequences }),
        })
        return { final: made.final, ...(whole.length && decoder.drawable(made.final)) }
      }),
    )
    try {
      for (const { lane, count } of batch) lane.cached += count
      const draws = whole.flatMap(({ lane }, state): Draw[] =>
        lane.row === undefined
          ? lane.running.rollouts.map((_, row) => ({ lane, row, state }))
          : [{ lane, row: lane.row, state }],
      )
      // The read of no states waits for the step all the same, so that the queue does not fill up.
      if (!rows.logits) await final.slice(0, 0).read()
      else await this.#draw(draws, rows.logits, rows.drawable!)
    } finally {
      for (const tensor of [final, rows.logits, rows.drawable]) tensor?.dispose()
    }
    this.#settle(whole.map(({ lane }) => lane))
  }

  /** Draws a token for each rollout from its row of the logits. */
  async #draw(
    draws: readonly Draw[],
    logits: Tensor<'f32'>,
    drawable: Tensor<'f32'>,
  ): Promise<void> {
    const reads = scope(() => {
      const index = draws.map(({ state }) => state)
      const isAll = index.length === logits.shape[0] && index.every((row, i) => row === i)
      const rowsOf = (x: Tensor<'f32'>) => (isAll ? x : gatherRows({ x, index }))
      const jobs = draws.map(({ lane }) => lane.running.job)
      const repetitionPenalty = jobs.map(({ sampling }) => sampling.repetitionPenalty)
      const isPenalised = repetitionPenalty.some((penalty) => penalty !== 1)
      const { tokens } = sampleTokens({
        logits: biased(rowsOf(drawable), draws),
        seeds: draws.map(({ lane, row }) => {
          const { job, rollouts } = lane.running
          return seedOf(job.seed, row, rollouts[row]!.tokens.length)
        }),
        temperature: jobs.map(({ sampling }) => sampling.temperature),
        topK: jobs.map(({ sampling }) => sampling.topK),
        topP: jobs.map(({ sampling }) => sampling.topP),
        minP: jobs.map(({ sampling }) => sampling.minP),
        ...(isPenalised && { repetitionPenalty, history: draws.map(({ lane }) => lane.tokens) }),
      })
      // Reading a row of logits again costs next to nothing beside making it.
      const scored = jobs.filter(({ logProbs }) => logProbs)
      const temperatures = [...new Set(scored.map((job) => job.logProbsTemperature))]
      const unbiased = temperatures.length ? rowsOf(logits) : undefined
      const known = temperatures.map((temperature) => {
        const of = { logits: unbiased!, targets: tokens, temperature }
        const { logProbs, stats } = tokenLogProbs(of)
        return { logProbs: logProbs.read(), stats: stats.read() }
      })
      const whole = draws.map(({ state }, i) =>
        jobs[i]!.topLogProbs ? logits.slice(state, state + 1).read() : undefined,
      )
      return { tokens: tokens.read(), temperatures, known, whole }
    })
    const [ids, logProbs, stats, whole] = await Promise.all([
      reads.tokens,
      Promise.all(reads.known.map((one) => one.logProbs)),
      Promise.all(reads.known.map((one) => one.stats)),
      Promise.all(reads.whole),
    ])
    draws.forEach(({ lane, row }, i) => {
      const { job, rollouts, ended } = lane.running
      const rollout = rollouts[row]!
      // Its request may have ended meanwhile.
      if (rollout.done || ended) return
      const token = ids[i]!
      rollout.tokens.push(token)
      if (job.logProbs) {
        const of = reads.temperatures.indexOf(job.logProbsTemperature)
        const logProb = logProbs[of]![i]!
        rollout.logProbs.push(logProb)
        const [maximum, logSum] = stats[of]!.subarray(2 * i, 2 * i + 2)
        rollout.topLogProbs?.push(
          largest(whole[i]!, job.topLogProbs).map(({ at, value }) => ({
            token: at,
            logProb: at === token ? logProb : value / job.logProbsTemperature - maximum! - logSum!,
          })),
        )
      }
      const stopped = job.onToken?.(row, token) === true || job.stopTokens.has(token)
      rollout.done = stopped || rollout.tokens.length === job.maxTokens
      rollout.finishReason = stopped ? 'stop' : 'length'
    })
  }

  /** After a step: prompts become rollouts, those that are done give back their pages. */
  #settle(lanes: readonly Lane[]): void {
    for (const lane of lanes) {
      // One whose request has ended meanwhile is not there any more.
      const at = this.#lanes.indexOf(lane)
      if (at < 0) continue
      const { running, row } = lane
      if (row !== undefined && !running.rollouts[row]!.done) {
        lane.tokens.push(running.rollouts[row]!.tokens.at(-1)!)
        continue
      }
      const next = row === undefined ? this.#fork(lane) : []
      this.#lanes.splice(at, 1, ...next)
      this.#release(lane)
    }
    const jobs = new Set(lanes.map(({ running }) => running))
    const isDone = ({ rollouts }: Running): boolean => rollouts.every(({ done }) => done)
    for (const running of jobs) {
      running.job.onStep?.(running.rollouts)
      if (isDone(running)) this.#end(running)
    }
  }

  #fork({ running, tokens, sequence, cached }: Lane): Lane[] {
    return running.rollouts.flatMap((rollout, row): Lane[] => {
      if (rollout.done) return []
      return [
        {
          running,
          row,
          tokens: [...tokens, rollout.tokens.at(-1)!],
          sequence: this.#cache!.add(sequence),
          cached,
        },
      ]
    })
  }

  /** Settles a request: with its rollouts, or, where there is a reason, without. */
  #end(running: Running, ...reasons: unknown[]): void {
    if (running.ended) return
    running.ended = true
    running.forget()
    for (const lane of this.#lanes) if (lane.running === running) this.#release(lane)
    this.#lanes = this.#lanes.filter((lane) => lane.running !== running)
    this.#waiting = this.#waiting.filter((lane) => lane.running !== running)
    const features = new Set(running.placements?.map(({ features }) => features))
    for (const { merged, deepstack } of features)
      for (const tensor of [merged, ...deepstack]) tensor.dispose()
    running.placements = []
    const { resolve, reject } = running.settle
    if (reasons.length) reject(reasons[0])
    else resolve(running.rollouts.map(({ done: _, ...rollout }) => rollout))
  }

  #release(lane: Lane): void {
    if (lane.sequence !== undefined && !this.#disposed) this.#cache?.remove(lane.sequence)
    lane.sequence = undefined
    lane.cached = 0
  }
}

/** Logits with the rollouts' biases, and penalties of the tokens that they have already. */
function biased(logits: Tensor<'f32'>, draws: readonly Draw[]): Tensor<'f32'> {
  const vocabulary = logits.shape[1]!
  const index: number[] = []
  const values: number[] = []
  draws.forEach(({ lane, row }, i) => {
    const { job, rollouts } = lane.running
    const { presencePenalty, frequencyPenalty, logitBias } = job.sampling
    const own = new Map(logitBias)
    const subtract = (token: number, by: number): void =>
      void own.set(token, (own.get(token) ?? 0) - by)
    if (presencePenalty || frequencyPenalty) {
      const { tokens } = rollouts[row]!
      for (const token of tokens) subtract(token, frequencyPenalty)
      for (const token of new Set(tokens)) subtract(token, presencePenalty)
    }
    for (const [token, value] of own) {
      index.push(i * vocabulary + token)
      values.push(value)
    }
  })
  if (!index.length) return logits
  const flat = logits.reshape([logits.shape[0]! * vocabulary, 1])
  const y = logits.device.tensor(values, [values.length, 1])
  return scatterAddRows({ x: flat, y, index }).reshape(logits.shape)
}

/** The k largest of some values, by falling value and of equals by rising place. */
function largest(values: Float32Array, k: number): { at: number; value: number }[] {
  const found: { at: number; value: number }[] = []
  values.forEach((value, at) => {
    if (found.length === k && !(value > found[k - 1]!.value)) return
    let place = found.length
    while (place > 0 && found[place - 1]!.value < value) place--
    found.splice(place, 0, { at, value })
    if (found.length > k) found.pop()
  })
  return found
}

/** The free pages that as many more tokens of a lane take. */
function pagesFor(cache: KvCache, { sequence }: Lane, count: number): number {
  if (sequence === undefined) return Math.ceil(count / cache.pageSize)
  return cache.pagesNeeded(sequence, count)
}

/** How many of the wanted tokens the free pages hold, by bisection. */
function fitting(cache: KvCache, lane: Lane, free: number, wanted: number): number {
  if (pagesFor(cache, lane, wanted) <= free) return wanted
  let [fits, exceeds] = [0, wanted]
  while (exceeds - fits > 1) {
    const middle = (fits + exceeds) >> 1
    if (pagesFor(cache, lane, middle) <= free) fits = middle
    else exceeds = middle
  }
  return fits
}

/** The next tokens of some lanes, packed, with their positions and the features that belong there. */
function packedPass(batch: readonly { lane: Lane; count: number }[]): {
  tokens: Int32Array
  positions: Int32Array
  cuSeqlens: number[]
  placements: Placement[]
  rows: number[]
} {
  const total = batch.reduce((sum, { count }) => sum + count, 0)
  const tokens = new Int32Array(total)
  const positions = new Int32Array(3 * total)
  const cuSeqlens = [0]
  const placements: Placement[] = []
  const rows: number[] = []
  let at = 0
  for (const { lane, count } of batch) {
    const { prompt } = lane.running.job
    const { length } = prompt.tokens
    const end = lane.cached + count
    for (let i = lane.cached; i < end; i++, at++) {
      tokens[at] = lane.tokens[i]!
      for (let axis = 0; axis < 3; axis++)
        positions[axis * total + at] =
          i < length ? prompt.positions[axis * length + i]! : i + prompt.deltas[0]!
    }
    const start = cuSeqlens.at(-1)!
    for (const { at: first, length: rows, features, from } of lane.running.placements ?? []) {
      const begin = Math.max(first, lane.cached)
      const own = Math.min(first + rows, end) - begin
      if (own > 0)
        placements.push({
          at: start + begin - lane.cached,
          length: own,
          features,
          from: from + begin - first,
        })
    }
    cuSeqlens.push(at)
    if (end === lane.tokens.length) rows.push(at - 1)
  }
  return { tokens, positions, cuSeqlens, placements, rows }
}

/** Two words of a prompt's content: prompts that differ draw other numbers, whatever their order. */
export function contentSeed(seed: number, tokens: Int32Array, repeat: number): [number, number] {
  let [a, b] = mixed([Math.floor(seed / 2 ** 32), seed | 0], repeat)
  for (const token of tokens) [a, b] = mixed([a, b], token)
  return [a, b]
}

/** The seed of a draw, an integer below 2^53. */
function seedOf(seed: readonly [number, number], rollout: number, step: number): number {
  const [a, b] = mixed(mixed(seed, rollout), step)
  return (a >>> 11) * 2 ** 32 + (b >>> 0)
}

/** Mixes a word into two, by the finalizer of MurmurHash3 (Appleby, 2011). */
function mixed([a, b]: readonly [number, number], word: number): [number, number] {
  const finish = (h: number): number => {
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b)
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
    return h ^ (h >>> 16)
  }
  const first = finish((Math.imul(a, 31) + word) ^ 0x9e3779b9)
  return [first, finish(Math.imul(b, 33) ^ (first + 0x7f4a7c15))]
}
