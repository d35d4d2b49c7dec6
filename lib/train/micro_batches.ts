/** A batch's sequences in pieces that are computed one after another. */
import { refuse } from '../errors.js'
import { patchesOf } from '../models/qwen3_vl/chat.js'
import type { Qwen3VL } from '../models/qwen3_vl/model.js'
import type { Vision } from '../models/qwen3_vl/prompt.js'
import type { RolloutBatch, RolloutItem, RolloutRequest } from '../p2r/rollouts.js'
import type { Tensor } from '../tensor.js'

/** The completions of one prompt, in the batch's order. */
interface Group {
  request: RolloutRequest
  prompt: readonly number[]
  completions: (readonly number[])[]
}

/** Prompts and completions of one pass. */
export interface MicroBatch {
  groups: Group[]
  /** Of the completions: their places among the batch's tokens. */
  from: number
  to: number
}

/** The arguments of the model's passes. */
export interface PackedBatch extends Disposable {
  tokens: Int32Array
  cuSeqlens: Int32Array
  /** A completion goes on after its prompt, which stands once. */
  prefixOf: Int32Array
  /** The completions' tokens. */
  targets: Int32Array
  images?: Vision
}

/**
 * Consecutive sequences of at most `most` tokens, prompts included; a longer sequence stands alone. A group that is cut
 * has its prompt in both pieces.
 */
export function microBatches(batch: RolloutBatch, most: number, op: string): MicroBatch[] {
  const made: MicroBatch[] = []
  let [count, at] = [0, 0]
  for (const { request, tokens } of batch.items.flatMap(trainedOf(op))) {
    const prompt = request.promptTokens!
    let current = made.at(-1)
    const shared = current?.groups.at(-1)?.request === request
    const more = tokens.length + (shared ? 0 : prompt.length)
    if (!current || count + more > most) {
      current = { groups: [], from: at, to: at }
      made.push(current)
      count = 0
    }
    let group = current.groups.at(-1)
    if (group?.request !== request) {
      group = { request, prompt, completions: [] }
      current.groups.push(group)
      count += prompt.length
    }
    group.completions.push(tokens)
    count += tokens.length
    at += tokens.length
    current.to = at
  }
  return made
}

/** Its rows, and the patches of its prompts' images, which are freed with it. */
export function pack(model: Qwen3VL, { groups }: MicroBatch, op: string): PackedBatch {
  const sequences: (readonly number[])[] = []
  const prefixOf: number[] = []
  const targets: number[] = []
  let end = 0
  for (const { prompt, completions } of groups) {
    const prefix = sequences.push(prompt) - 1
    prefixOf.push(-1)
    end += prompt.length
    for (const tokens of completions) {
      sequences.push(tokens)
      prefixOf.push(prefix)
      for (let i = 0; i < tokens.length; i++) targets.push(end + i)
      end += tokens.length
    }
  }
  const cuSeqlens = new Int32Array(sequences.length + 1)
  for (const [i, tokens] of sequences.entries()) cuSeqlens[i + 1] = cuSeqlens[i]! + tokens.length
  const shown: Tensor<'u8'>[] = groups.flatMap(({ request }) => [...request.images])
  const images = patchesOf(model, shown, op)
  return {
    tokens: Int32Array.from(sequences.flatMap((tokens) => [...tokens])),
    cuSeqlens,
    prefixOf: Int32Array.from(prefixOf),
    targets: Int32Array.from(targets),
    ...(images && { images }),
    [Symbol.dispose]: () => images?.pixelValues.dispose(),
  }
}

/** What there is to train on of an item: nothing where it failed or is empty. */
function trainedOf(op: string) {
  return (item: RolloutItem): { request: RolloutRequest; tokens: readonly number[] }[] => {
    const { request, completion, error } = item
    if (error || !completion.tokens?.length) return []
    if (!request?.promptTokens)
      refuse('ERR_POLICY', op, 'a rollout has no prompt tokens, and training needs them')
    return [{ request, tokens: completion.tokens }]
  }
}
