import { randomUUID } from 'node:crypto'
import { existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { checkArguments, checkBoolean, describeValue, type Names } from './arguments.js'
import { type DType, isDType } from './dtype.js'
import { refuse } from './errors.js'
import type { DeviceHandle, TensorHandle } from './native.js'

/** What another process needs to open a tensor's memory. Plain data: it survives JSON. */
export interface IpcDescription {
  /** Of which kind the memory is; it can be opened on a device of this kind only. */
  backend: 'cpu' | 'cuda'
  /**
   * CUDA: the 64 bytes of cudaIpcMemHandle_t in hexadecimal digits. CPU: the path of a file to map, which is
   * `/proc/PID/fd/N`, a descriptor of the sharing process, unless `file` was asked for.
   */
  name: string
  /** Size of the named memory. */
  bytes: number
  /** Where the tensor starts in the named memory, in bytes. */
  offset: number
  /** Of the tensor. */
  shape: readonly number[]
  /** Of the tensor. */
  dtype: DType
  /** The process whose memory it is. */
  pid: number
}

/** How the CPU shares memory. */
export interface IpcOptions {
  /**
   * Whether in a new file under /dev/shm, which only its owner may open, instead of in memory without a file (default
   * false on Linux; elsewhere there are files alone, in the system's folder for temporary ones). For processes
   * that cannot see each other's /proc, such as those of two containers with a common /dev/shm. The file is removed
   * with the handle, and when the process exits, by an exception too; a process that a signal ends leaves its files. One
   * that shortens such a file ends all others that use it, so a reader must say `anyFile`.
   */
  file?: boolean
}

/** Which memory a process opens. */
export interface IpcOpenOptions {
  /**
   * On the CPU: whether any regular file may be opened, and so be written to (default false: only memory that
   * `ipcHandle()` shares, or what is sealed as that is). If another process shortens the file, this one is ended by the
   * system (SIGBUS).
   */
  anyFile?: boolean
}

/**
 * By which other processes open a tensor's memory. Until the handle is disposed, the memory is neither
 * moved, freed nor reused, even if the tensor is disposed. When its process ends nothing is left, but for the files of
 * one that a signal ends.
 */
export interface IpcHandle extends IpcDescription, Disposable {
  /**
   * Releases the memory; on the CPU its name opens nothing from then on. On the CPU, processes that have it open keep
   * it; on CUDA they must close it before.
   */
  dispose(): void
}

/** @internal Resolves to the handle once the work queued on the tensor is done. */
export async function share(
  tensor: TensorHandle,
  what: { backend: 'cpu' | 'cuda'; shape: readonly number[]; dtype: DType },
  options: IpcOptions,
): Promise<IpcHandle> {
  const op = 'ipcHandle'
  const { file = !sealed } = checkArguments(options, { file: true } satisfies Names<IpcOptions>, op)
  checkBoolean(file, 'file', op)
  if (what.backend === 'cuda' && options.file)
    refuse('ERR_VALUE', op, 'file is an option of the CPU, got a tensor on a CUDA device')
  if (!file && !sealed) refuse('ERR_VALUE', op, 'this system shares memory by files alone')
  // A file under /dev/shm is in memory (tmpfs); elsewhere the system may write it back to a disk.
  const folder = existsSync('/dev/shm') ? '/dev/shm' : tmpdir()
  // A further tensor handle on the same storage keeps the memory alive.
  const held = tensor.reshape(what.shape)
  try {
    const path = join(folder, `p2r-kernels-${process.pid}-${randomUUID()}`)
    const [name, offset, bytes] = await held.share(file ? path : '').catch((error) => {
      // The tensor has a fault: it is shared all the same until this.
      if (!held.disposed) held.unshare()
      throw error
    })
    if (what.backend === 'cpu' && file !== ownFile.test(name)) {
      held.unshare()
      const how = file ? 'without a file' : 'in a file'
      refuse('ERR_VALUE', op, `the memory is shared ${how} until its other handles are disposed`)
    }
    let open = true
    const dispose = (): void => {
      if (!open) return
      open = false
      shared.delete(handle)
      if (!held.disposed) held.unshare()
      held.dispose()
    }
    const { backend, shape, dtype } = what
    const handle: IpcHandle = {
      backend,
      name,
      bytes,
      offset,
      shape,
      dtype,
      pid: process.pid,
      dispose,
      [Symbol.dispose]: dispose,
    }
    for (const key of ['dispose', Symbol.dispose])
      Object.defineProperty(handle, key, { enumerable: false })
    // Referenced, so that garbage collection does not free memory that another process reads.
    shared.add(handle)
    return handle
  } catch (error) {
    held.dispose()
    throw error
  }
}

const shared = new Set<IpcHandle>()

// Where memory can be shared without a file, and sealed against shortening.
const sealed = process.platform === 'linux'
// A file that `ipcHandle` names.
const ownFile = /\/p2r-kernels-\d+-[0-9a-f-]{36}$/

/** @internal */
export function openShared(
  device: DeviceHandle,
  backend: 'cpu' | 'cuda',
  description: IpcDescription,
  options: IpcOpenOptions,
): TensorHandle {
  const op = 'fromIpcHandle'
  const given = checked(description, op)
  const { name, bytes, offset, shape, dtype, pid } = given
  const { anyFile = !sealed && ownFile.test(name) } = checkArguments(
    options,
    { anyFile: true } satisfies Names<IpcOpenOptions>,
    op,
  )
  checkBoolean(anyFile, 'anyFile', op)
  if (given.backend !== backend)
    refuse(
      'ERR_DEVICE',
      op,
      `a handle of ${given.backend} memory cannot be opened on a ${backend} device`,
    )
  if (backend === 'cuda' && pid === process.pid)
    refuse('ERR_DEVICE', op, 'CUDA opens handles of other processes only, and this is its own')
  return device.openShared(name, bytes, offset, shape, dtype, anyFile)
}

function checked(description: IpcDescription, op: string): IpcDescription {
  const { backend, name, bytes, offset, shape, dtype, pid } = description ?? {}
  if (
    !['cpu', 'cuda'].includes(backend as string) ||
    typeof name !== 'string' ||
    typeof bytes !== 'number' ||
    typeof offset !== 'number' ||
    !Array.isArray(shape) ||
    !isDType(dtype)
  )
    refuse('ERR_VALUE', op, `expected what ipcHandle() gave, got ${describeValue(description)}`)
  return { backend, name, bytes, offset, shape, dtype, pid }
}
