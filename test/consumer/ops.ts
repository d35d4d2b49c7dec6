// Every operation, as a strict consumer calls it. It is compiled, never run.
import { gelu, geluBackward, type Tensor } from 'p2r-kernels'

export function activations(x: Tensor, dOut: Tensor): Tensor[] {
  return [
    gelu({ x }),
    gelu({ x, approximate: 'tanh' }),
    geluBackward({ dOut, x }),
    geluBackward({ dOut, x, approximate: 'none' }),
  ]
}
// @ts-expect-error no such form
export const wrong = (x: Tensor): Tensor => gelu({ x, approximate: 'fast' })
