// OpenCV (opencv.py), if Python has it.
import type { Peer } from '../harness.js'
import { pythonPeer } from './python.js'
import type { Cut, Picture } from './sharp.js'

/** Bicubic without antialiasing: its pixels differ by what it leaves out, so it is compared for speed. */
export function opencvResize({ data, height, width }: Picture, cuts: readonly Cut[]): Peer {
  return pythonPeer({
    name: 'OpenCV, not antialiased',
    script: 'opencv',
    call: 'resample',
    tolerance: 0.1,
    backends: ['cpu'],
    arrays: () => ({ image: { data, dtype: 'u8', shape: [height, width, 3] } }),
    options: { cuts },
  })
}
