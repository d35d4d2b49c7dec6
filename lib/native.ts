import { fileURLToPath } from 'node:url'
import bindings from 'bindings'
import type { DeviceInfo } from './device.js'
import { P2RError } from './errors.js'

/** What the addon takes as host data. */
export type TypedArray = Float32Array | Float64Array | Uint16Array | Int32Array | Uint8Array

/** A tensor's native half; see binding/tensor.h. */
export interface TensorHandle {
  readonly shape: number[]
  readonly dtype: string
  readonly disposed: boolean
  reshape(shape: readonly number[]): TensorHandle
  slice(start: number, end: number): TensorHandle
  read(): Promise<ArrayBuffer>
  write(data: TypedArray): void
  copyFrom(other: TensorHandle): void
  to(device: DeviceHandle | undefined): TensorHandle
  join(): void
  share(path: string): Promise<[name: string, offset: number, bytes: number]>
  unshare(): void
  dispose(): void
}

/** A device's native half; see binding/device.h. */
export interface DeviceHandle {
  readonly disposed: boolean
  info(): DeviceInfo
  tensor(data: TypedArray, shape: readonly number[], dtype: string): TensorHandle
  zeros(shape: readonly number[], dtype: string): TensorHandle
  openShared(
    name: string,
    bytes: number,
    offset: number,
    shape: readonly number[],
    dtype: string,
  ): TensorHandle
  synchronize(): Promise<void>
  time(f: () => void): Promise<number>
  memory(): { liveBytes: number; peakBytes: number; reservedBytes: number }
  /** The kernels an operation can choose from; ERR_VALUE for one without such a choice. */
  kernels(op: string): string[]
  resetPeak(): void
  dispose(): void
}

export interface Native {
  initialize(errorClass: typeof P2RError): void
  openDevice(id: string, options: object): DeviceHandle
  devices(): DeviceInfo[]
  cudaStatus(): { built: boolean; available: boolean; reason: string }
  beginComposite(name: string): void
  endComposite(): void
  /**
   * Writes the next `calls` CPU calls of at most `work` (ops/recording.h) into a folder as cases for the
   * kernel twin; '' ends it.
   */
  record(
    folder: string,
    work?: number,
    calls?: number,
    absolute?: number,
    relative?: number,
    ofLargest?: number,
  ): void
  /** The operations by their names in ops.def; lib/ops gives each its types. */
  ops: Record<string, (...args: unknown[]) => unknown>
}

let loaded: Native | undefined

/** The addon, loaded at the first device call so that importing the package never throws. */
export function native(): Native {
  if (loaded) return loaded
  try {
    const root = fileURLToPath(new URL('../..', import.meta.url))
    loaded = bindings({ bindings: 'p2r_kernels', module_root: root }) as Native
  } catch (cause) {
    throw new P2RError(
      'ERR_NATIVE',
      'The native addon of p2r-kernels could not be loaded. Build it with `npm run build` in the ' +
        'package (a C++20 compiler and CMake or make are needed), or reinstall the package.',
      { cause },
    )
  }
  loaded.initialize(P2RError)
  return loaded
}
