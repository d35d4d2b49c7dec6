/**
 * Rollouts in lock step: an image goes through the model once for all questions about it, and a question once for its
 * rollouts, which share the cache's pages. `Qwen3VL.generate` shares a prompt with its rollouts, but not an image
 * among prompts, and at this size the tower's passes are most of the time.
 */
import {
  add,
  gatherRows,
  type KvCache,
  type Qwen3VL,
  sampleTokens,
  scopeAsync,
  type Tensor,
  type Vision,
} from 'p2r-kernels'
import type { Rng } from '../mini-p2r/rng.js'
import { mergedOf } from './batch.js'
import {
  END,
  IMAGE,
  imageTokens,
  MAX_TOKENS,
  questionTokens,
  type Role,
  VIDEO,
  WORDS,
} from './vocabulary.js'

/** A question about an image, and the temperature of each of its rollouts; 0 is greedy. */
export interface Ask {
  image: number
  colour: number
  temperatures: readonly number[]
}

interface Lane {
  sequence: number
  tokens: number[]
  temperature: number
}

export class Sampler implements Disposable {
  readonly #model: Qwen3VL
  readonly #cache: KvCache
  /** Placeholders are never drawn. */
  readonly #mask: Tensor<'f32'>

  constructor(model: Qwen3VL, cacheTokens: number) {
    this.#model = model
    this.#cache = model.kvCache(cacheTokens)
    const mask = new Float32Array(WORDS.length)
    for (const token of [IMAGE, VIDEO]) mask[token] = Number.NEGATIVE_INFINITY
    this.#mask = model.device.tensor(mask, [WORDS.length])
  }

  /** The rollouts of each question: their tokens, with the one that ended them. */
  async rollouts(
    role: Role,
    vision: Vision,
    asks: readonly Ask[],
    rng: Rng,
  ): Promise<number[][][]> {
    const kv = this.#cache
    const model = this.#model
    const open: number[] = []
    const hold = (from?: number): number => {
      const sequence = kv.add(from)
      open.push(sequence)
      return sequence
    }
    try {
      const images = vision.gridThw.map(() => hold())
      const shown = joined(vision.gridThw.map((grid) => imageTokens(mergedOf(grid))))
      model
        .forward({ ...shown, images: vision, cache: { kv, sequences: images }, want: [] })
        .dispose()
      const questions = asks.map(({ image }) => hold(images[image]))
      const asked = joined(asks.map(({ colour }) => questionTokens(role, colour)))
      const ends = asked.cuSeqlens.slice(1).map((end) => end - 1)
      const lanes = asks.map(({ temperatures }, q) =>
        temperatures.map(
          (temperature): Lane => ({ sequence: questions[q]!, tokens: [], temperature }),
        ),
      )
      const first = lanes.flatMap((own, q) => own.map(() => q))
      let active = lanes.flat()
      await scopeAsync(async () => {
        const cache = { kv, sequences: questions }
        const { logits } = model.forward({ ...asked, cache, rows: ends, want: ['logits'] })
        await this.#draw(gatherRows({ x: logits as Tensor<'f32'>, index: first }), active, rng)
      })
      for (const lane of active) lane.sequence = hold(lane.sequence)
      for (let length = 1; length < MAX_TOKENS[role]; length++) {
        active = active.filter(({ tokens }) => tokens.at(-1) !== END)
        if (!active.length) break
        const one = joined(active.map(({ tokens }) => tokens.slice(-1)))
        const cache = { kv, sequences: active.map(({ sequence }) => sequence) }
        await scopeAsync(async () => {
          const { logits } = model.forward({ ...one, cache, want: ['logits'] })
          await this.#draw(logits as Tensor<'f32'>, active, rng)
        })
      }
      return lanes.map((own) => own.map(({ tokens }) => tokens))
    } finally {
      for (const sequence of open) kv.remove(sequence)
    }
  }

  dispose(): void {
    this.#cache.dispose()
    this.#mask.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  async #draw(logits: Tensor<'f32'>, lanes: readonly Lane[], rng: Rng): Promise<void> {
    const { tokens } = sampleTokens({
      logits: add({ x: logits, y: this.#mask }),
      temperature: lanes.map(({ temperature }) => temperature),
      seeds: lanes.map(() => rng.uint32()),
    })
    const drawn = await tokens.read()
    for (const [i, lane] of lanes.entries()) lane.tokens.push(drawn[i]!)
  }
}

function joined(sequences: readonly (readonly number[])[]): {
  tokens: number[]
  cuSeqlens: number[]
} {
  const tokens: number[] = []
  const cuSeqlens = [0]
  for (const sequence of sequences) {
    tokens.push(...sequence)
    cuSeqlens.push(tokens.length)
  }
  return { tokens, cuSeqlens }
}
