/**
 * A detection loss on the tower's output tokens through a head that is thrown away after the warm start. It stands in
 * for a pretrained tower: for each colour, which of an overview's 16 tokens holds the needle, and the needle's column
 * and row, read at that token.
 */
import {
  add,
  concat,
  type Device,
  gatherRows,
  gatherRowsBackward,
  linear,
  linearBackward,
  type Tensor,
  tokenLogProbs,
  tokenLogProbsBackward,
  transpose,
} from 'p2r-kernels'
import type { Rng } from '../mini-p2r/rng.js'
import { LATTICE, QUESTIONS } from '../mini-p2r/scene.js'

/** Tokens of an overview along a side, and cells of a token. */
const SIDE = 4
const TOKENS = SIDE ** 2
const CELLS = LATTICE / SIDE
const WIDTH = 64

type Parameters = Record<string, Tensor<'f32'>>

export class Detection {
  readonly parameters: Parameters

  constructor(device: Device, rng: Rng) {
    const random = (outputs: number): Tensor<'f32'> =>
      device.tensor(
        Float32Array.from({ length: outputs * WIDTH }, () => rng.normal() / Math.sqrt(WIDTH)),
        [outputs, WIDTH],
      )
    this.parameters = { which: random(QUESTIONS), where: random(QUESTIONS * 2 * LATTICE) }
  }

  /**
   * features: [16 · canvases, 64]; cells: each canvas's needles, in the order of the colours. The loss is the mean over
   * needles, its gradients are multiplied by `weight`.
   */
  loss(features: Tensor<'f32'>, cells: readonly (readonly number[])[], weight: number) {
    const { which, where } = this.parameters as { which: Tensor<'f32'>; where: Tensor<'f32'> }
    const { device } = features
    const count = cells.length
    const scale = -weight / (count * QUESTIONS)
    const filled = (size: number): Tensor<'f32'> =>
      device.tensor(new Float32Array(size).fill(scale), [size])
    const tokenOf = (cell: number): number =>
      Math.floor(Math.floor(cell / LATTICE) / CELLS) * SIDE + Math.floor((cell % LATTICE) / CELLS)
    const colours = Array.from({ length: QUESTIONS }, (_, colour) => colour)
    const needles = colours.flatMap((colour) => cells.map((own) => own[colour]!))

    // Rows of a colour's scores of an overview's tokens.
    const scores = linear({ x: features, weight: which })
    const chosen = {
      logits: transpose({ x: scores }).reshape([QUESTIONS * count, TOKENS]),
      targets: device.tensor(Int32Array.from(needles, tokenOf), [needles.length], 'i32'),
    }
    const choice = tokenLogProbs(chosen)
    const dScores = transpose({
      x: tokenLogProbsBackward({
        ...chosen,
        stats: choice.stats,
        dLogProbs: filled(needles.length),
      }).reshape([QUESTIONS, count * TOKENS]),
    })
    const choiceBack = linearBackward({ dOut: dScores, x: features, weight: which })

    const index = needles.map((cell, i) => (i % count) * TOKENS + tokenOf(cell))
    const at = gatherRows({ x: features, index })
    const parts = colours.map((colour) => {
      const rows = at.slice(colour * count, (colour + 1) * count)
      const head = where.slice(colour * 2 * LATTICE, (colour + 1) * 2 * LATTICE)
      const targets = cells.flatMap((own) => {
        const cell = own[colour]!
        return [cell % LATTICE, Math.floor(cell / LATTICE)]
      })
      const read = {
        logits: linear({ x: rows, weight: head }).reshape([2 * count, LATTICE]),
        targets: device.tensor(Int32Array.from(targets), [2 * count], 'i32'),
      }
      const { logProbs, stats } = tokenLogProbs(read)
      const dLogits = tokenLogProbsBackward({ ...read, stats, dLogProbs: filled(2 * count) })
      const back = linearBackward({
        dOut: dLogits.reshape([count, 2 * LATTICE]),
        x: rows,
        weight: head,
      })
      return { logProbs, ...back }
    })
    const dAt = concat({ tensors: parts.map(({ dX }) => dX) })
    const dFeatures = add({
      x: choiceBack.dX,
      y: gatherRowsBackward({ dOut: dAt, index, rows: count * TOKENS }),
    })
    return {
      /** [9 · canvases]: the log-probabilities of the right tokens, columns and rows. */
      logProbs: concat({ tensors: [choice.logProbs, ...parts.map(({ logProbs }) => logProbs)] }),
      dFeatures,
      gradients: {
        which: choiceBack.dWeight,
        where: concat({ tensors: parts.map(({ dWeight }) => dWeight) }),
      } as Parameters,
    }
  }
}
