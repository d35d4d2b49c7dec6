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
 * random numbers of a draw follow from the request, not from the batch. Log-probabilities are computed by the kernel of
 * `logProbs`, from the final states that are kept until enough have come together.
 */
import { type AbortSignalLike, onAbort } from '../../abort.js'
import { composite } from '../../composite.js'
import { P2RError, refuse } from '../../errors.js'
import { cachedAttention, type KvCache } from '../../ops/cached_attention.js'
import { gatherRows } from '../../ops/rows.js'
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
}

/** One continuation of a prompt. */
export interface Rollout {
  tokens: number[]
  logProbs: number[]
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
  /** 'end': they are there when the job is done; 'step': with each token. */
  logProbs: 'none' | 'end' | 'step'
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
/** States that wait for their log-probabilities. */
const maxStates = 256

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

/** A drawn token's final state, until its log-probability is computed. */
interface State {
  rollout: Rollout
  at: number
  token: number
  states: Tensor
  row: number
  temperature: number
}

export class Scheduler {
  readonly #model: Model
  #cache: KvCache | undefined
  #waiting: Lane[] = []
  #lanes: Lane[] = []
  #states: State[] = []
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
    const { final, logits } = composite(op, () =>
      scope(() => {
        const made = decoder.run({
          ...pass,
          attend: (layer, q, k, v) =>
            cachedAttention({ q, k, v, cuSeqlens: pass.cuSeqlens, cache, layer, sequences }).out,
        })
        return {
          final: made.final,
          logits: whole.length ? decoder.drawable(made.final) : undefined,
        }
      }),
    )
    try {
      for (const { lane, count } of batch) lane.cached += count
      const draws = whole.flatMap(({ lane }, state) =>
        lane.row === undefined
          ? lane.running.rollouts.map((_, row) => ({ lane, row, state }))
          : [{ lane, row: lane.row, state }],
      )
      // The read of no states waits for the step all the same, so that the queue does not fill up.
      if (!logits) await final.slice(0, 0).read()
      else await this.#draw(draws, logits, final)
    } finally {
      logits?.dispose()
      if (!this.#states.some(({ states }) => states === final)) final.dispose()
    }
    await this.#settle(whole.map(({ lane }) => lane))
  }

  /** Draws a token for each rollout from its row of the logits. */
  async #draw(
    draws: readonly { lane: Lane; row: number; state: number }[],
    logits: Tensor,
    final: Tensor,
  ): Promise<void> {
    const tokens = scope(() => {
      const index = draws.map(({ state }) => state)
      const isAll = index.length === logits.shape[0] && index.every((row, i) => row === i)
      const each = <K extends keyof Sampling>(name: K): number[] =>
        draws.map(({ lane }) => lane.running.job.sampling[name])
      const repetitionPenalty = each('repetitionPenalty')
      const isPenalised = repetitionPenalty.some((penalty) => penalty !== 1)
      return sampleTokens({
        logits: isAll ? logits : gatherRows({ x: logits, index }),
        seeds: draws.map(({ lane, row }) => {
          const { job, rollouts } = lane.running
          return seedOf(job.seed, row, rollouts[row]!.tokens.length)
        }),
        temperature: each('temperature'),
        topK: each('topK'),
        topP: each('topP'),
        minP: each('minP'),
        ...(isPenalised && { repetitionPenalty, history: draws.map(({ lane }) => lane.tokens) }),
      }).tokens
    })
    let ids: Int32Array
    try {
      ids = await tokens.read()
    } finally {
      tokens.dispose()
    }
    draws.forEach(({ lane, row, state }, i) => {
      const { job, rollouts, ended } = lane.running
      const rollout = rollouts[row]!
      // Its request may have ended meanwhile.
      if (rollout.done || ended) return
      const token = ids[i]!
      const at = rollout.tokens.push(token) - 1
      if (job.logProbs !== 'none') {
        const { logProbsTemperature: temperature } = job
        this.#states.push({ rollout, at, token, states: final, row: state, temperature })
      }
      const stopped = job.onToken?.(row, token) === true || job.stopTokens.has(token)
      rollout.done = stopped || rollout.tokens.length === job.maxTokens
      rollout.finishReason = stopped ? 'stop' : 'length'
    })
  }

  /** After a step: prompts become rollouts, those that are done give back their pages. */
  async #settle(lanes: readonly Lane[]): Promise<void> {
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
    const due = [...jobs].some((running) => isDone(running) || running.job.logProbs === 'step')
    if (due || this.#states.length >= maxStates) await this.#flush()
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

  /** The log-probabilities of the drawn tokens whose states were kept. */
  async #flush(): Promise<void> {
    const all = this.#states
    this.#states = []
    const { decoder } = this.#model
    const steps = [...new Set(all.map(({ states }) => states))]
    try {
      const reads = scope(() => {
        const starts = new Map<Tensor, number>()
        let rows = 0
        for (const step of steps) {
          starts.set(step, rows)
          rows += step.shape[0]!
        }
        if (!rows) return []
        const [first] = steps
        const joined = first!.device.zeros([rows, first!.shape[1]!], first!.dtype)
        for (const step of steps) {
          const start = starts.get(step)!
          joined.slice(start, start + step.shape[0]!).copyFrom(step)
        }
        const groups = groupedBy(all, ({ temperature }) => temperature)
        return [...groups].map(([temperature, group]) => {
          const index = group.map(({ states, row }) => starts.get(states)! + row)
          const targets = Int32Array.from(group, ({ token }) => token)
          const states = gatherRows({ x: joined, index })
          return { group, read: decoder.logProbs(states, targets, temperature).logProbs.read() }
        })
      })
      for (const { group, read } of reads) {
        const values = await read
        group.forEach(({ rollout, at }, i) => {
          rollout.logProbs[at] = values[i]!
        })
      }
    } finally {
      for (const step of steps) step.dispose()
    }
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
    if (reasons.length) this.#dropStates(running)
    const { resolve, reject } = running.settle
    if (reasons.length) reject(reasons[0])
    else
      resolve(
        running.rollouts.map(({ tokens, logProbs, finishReason }) => ({
          tokens,
          logProbs,
          finishReason,
        })),
      )
  }

  #dropStates({ rollouts }: Running): void {
    const own = new Set<Rollout>(rollouts)
    const kept = this.#states.filter(({ rollout }) => !own.has(rollout))
    const needed = new Set(kept.map(({ states }) => states))
    for (const { states } of this.#states) if (!needed.has(states)) states.dispose()
    this.#states = kept
  }

  #release(lane: Lane): void {
    if (lane.sequence !== undefined && !this.#disposed) this.#cache?.remove(lane.sequence)
    lane.sequence = undefined
    lane.cached = 0
  }
}

function groupedBy<T, K>(list: readonly T[], keyOf: (item: T) => K): Map<K, T[]> {
  const groups = new Map<K, T[]>()
  for (const item of list) {
    const key = keyOf(item)
    groups.set(key, [...(groups.get(key) ?? []), item])
  }
  return groups
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
