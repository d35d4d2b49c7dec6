import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import type bindings from 'bindings'
import type { CudaStatus, DeviceInfo, MemoryUse } from './device.js'
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
  /** Fills a buffer of the data's bytes. */
  read(into: ArrayBuffer): Promise<void>
  /** The values, of a tensor of the CPU whose queue is idle and without a raised fault; else undefined. */
  peek(): Float64Array | undefined
  write(data: TypedArray): void
  copyFrom(other: TensorHandle): void
  to(device: DeviceHandle | undefined): TensorHandle
  join(): void
  /** On the CPU into a new file at `path`, or where that is '' into sealed memory. */
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
    anyFile: boolean,
  ): TensorHandle
  synchronize(): Promise<void>
  time(f: () => void): Promise<number>
  memory(): MemoryUse
  /** The kernels an operation can choose from; ERR_VALUE for one without such a choice. */
  kernels(op: string): string[]
  resetPeak(): void
  dispose(): void
}

export interface Native {
  initialize(errorClass: typeof P2RError): void
  openDevice(id: string, options: object): DeviceHandle
  devices(): DeviceInfo[]
  cudaStatus(): CudaStatus
  /**
   * What the processor can do at most (ops/ceilings.h), as operations and bytes a second. Blocks for some
   * tens of milliseconds.
   */
  ceilings(
    threads: number,
    bytes: number,
    rounds: number,
  ): { fma: number; bf16?: number; read: number; copy: number; update: number }
  /** A scope whose queued work can be withdrawn, as a number from 1 on. */
  openAbort(): number
  /** The calls that come belong to this scope; 0: to none. */
  abortBy(scope: number): void
  /** Leaves out the scope's work that has not begun. */
  abort(scope: number): void
  closeAbort(scope: number): void
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

/** What the addon must know of the scopes that can be aborted, before each call while there are any (lib/scope.ts). */
export const abortScopes = {
  /** How many there are. */
  open: 0,
  /** That of the current scope, as `Native.openAbort` gave it; 0 for none. */
  current: (): number => 0,
}

/** The addon, loaded at the first device call so that importing the package never throws. */
export function native(): Native {
  if (!loaded) {
    const addon = load()
    addon.initialize(P2RError)
    loaded = addon
  }
  if (abortScopes.open > 0) loaded.abortBy(abortScopes.current())
  return loaded
}

/** The platforms that the package holds a prebuild for, made by scripts/prebuild.mjs. */
export const prebuilt: readonly string[] = ['linux-x64', 'linux-arm64']

/**
 * The file that P2R_ADDON names; or what was built from source in the package; or the prebuild of this
 * platform. One that is there and cannot be loaded is an error, never a reason for the next.
 */
function load(): Native {
  const { P2R_ADDON } = process.env
  if (P2R_ADDON) {
    const path = resolve(P2R_ADDON)
    return opened(() => createRequire(path)(path))
  }
  const root = packageRoot()
  const require = createRequire(join(root, 'package.json'))
  const built = join(root, 'build/Release/p2r_kernels.node')
  if (existsSync(built))
    return opened(() =>
      (require('bindings') as typeof bindings)({ bindings: 'p2r_kernels', module_root: root }),
    )
  const prebuild = join(root, `prebuilds/${process.platform}-${process.arch}/p2r_kernels.node`)
  if (existsSync(prebuild)) return opened(() => require(prebuild))
  throw new P2RError('ERR_NATIVE', `p2r-kernels has no native addon for ${here()}.\n${advice()}`)
}

function opened(open: () => unknown): Native {
  try {
    return open() as Native
  } catch (cause) {
    const [reason] = (cause as Error).message.split('\n')
    throw new P2RError(
      'ERR_NATIVE',
      `p2r-kernels could not load its native addon on ${here()}: ${reason}\n${advice()}`,
      { cause },
    )
  }
}

function here(): string {
  const platform = `${process.platform}-${process.arch}`
  if (process.platform !== 'linux') return platform
  // Node's report names the glibc that it runs on, and nothing on musl.
  const { header } = process.report.getReport() as { header?: { glibcVersionRuntime?: string } }
  const version = header?.glibcVersionRuntime
  return `${platform} with ${version ? `glibc ${version}` : 'musl'}`
}

const advice = (): string =>
  `Prebuilt are ${prebuilt.join(' and ')}, for glibc 2.28 or later. Elsewhere build it from source, ` +
  'with a C++20 compiler and CMake or make:\n  npx p2r-kernels build'

/** The package's folder, two above this file, unless a bundler has put this code into another one. */
function packageRoot(): string {
  // A bundle in CommonJS has no import.meta.
  const url: string | undefined = import.meta.url
  if (url) {
    const root = join(dirname(fileURLToPath(url)), '../..')
    try {
      const manifest = readFileSync(join(root, 'package.json'), 'utf8')
      if ((JSON.parse(manifest) as { name?: string }).name === 'p2r-kernels') return root
    } catch {
      // Told below.
    }
  }
  throw new P2RError(
    'ERR_NATIVE',
    'p2r-kernels was bundled, but its native addon cannot be. Keep it external:\n' +
      "esbuild: --external:p2r-kernels; rolldown, rollup: external: ['p2r-kernels'];\n" +
      "webpack: externals: { 'p2r-kernels': 'import p2r-kernels' }; or name the addon in P2R_ADDON.",
  )
}
