// Pillow and NumPy (pillow.py), if Python has them.
import type { Peer } from '../harness.js'
import { pythonPeer } from './python.js'
import type { Cut, Picture } from './sharp.js'

function pillow(name: string, call: string, tolerance: number) {
  return ({ data, height, width }: Picture, cuts: readonly Cut[]): Peer =>
    pythonPeer({
      name,
      script: 'pillow',
      call,
      tolerance,
      backends: ['cpu'],
      arrays: () => ({ image: { data, dtype: 'u8', shape: [height, width, 3] } }),
      options: { cuts },
    })
}

/** Its bytes are ours. */
export const pillowResize = pillow('Pillow', 'resample', 0)

export const pillowPatches = pillow('Pillow + NumPy', 'patches', 1e-6)
