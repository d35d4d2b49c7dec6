import { randomUUID } from 'node:crypto'
import { existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describeValue } from './arguments.js'
import { type DType, isDType } from './dtype.js'
import { refuse } from './errors.js'
import type { DeviceHandle, TensorHandle } from './native.js'

/** What another process needs to open a tensor's memory. Plain data: it survives JSON. */
export interface IpcDescription {
  /** Of which kind the memory is; it can be opened on a device of this kind only. */
  backend: 'cpu' | 'cuda'
  /** CUDA: the 64 bytes of cudaIpcMemHandle_t in hexadecimal digits. CPU: the path of a file to map. */
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

/**
 * By which other processes open a tensor's memory. Until the handle is disposed, the memory is neither
 * moved, freed nor reused, even if the tensor is disposed. A killed process leaves its files in /dev/shm.
 */
export interface IpcHandle extends IpcDescription, Disposable {
  /**
   * Releases the memory, and on the CPU removes the file. On the CPU, processes that have it open keep
   * it; on CUDA they must close it before.
   */
  dispose(): void
}

/** @internal Resolves to the handle once the work queued on the tensor is done. */
export async function share(
  tensor: TensorHandle,
  what: { backend: 'cpu' | 'cuda'; shape: readonly number[]; dtype: DType },
): Promise<IpcHandle> {
  // A file under /dev/shm is in memory (tmpfs); elsewhere the system may write it back to a disk.
  const folder = existsSync('/dev/shm') ? '/dev/shm' : tmpdir()
  // A further tensor handle on the same storage keeps the memory alive.
  const held = tensor.reshape(what.shape)
  try {
    const path = join(folder, `p2r-kernels-${process.pid}-${randomUUID()}`)
    const [name, offset, bytes] = await held.share(path)
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

/** @internal */
export function openShared(
  device: DeviceHandle,
  backend: 'cpu' | 'cuda',
  description: IpcDescription,
): TensorHandle {
  const op = 'fromIpcHandle'
  const { name, bytes, offset, shape, dtype, pid } = checked(description, op)
  if (description.backend !== backend)
    refuse(
      'ERR_DEVICE',
      op,
      `a handle of ${description.backend} memory cannot be opened on a ${backend} device`,
    )
  if (backend === 'cuda' && pid === process.pid)
    refuse('ERR_DEVICE', op, 'CUDA opens handles of other processes only, and this is its own')
  return device.openShared(name, bytes, offset, shape, dtype)
}

function checked(description: IpcDescription, op: string): IpcDescription {
  const { backend, name, bytes, offset, shape, dtype } = description ?? {}
  if (
    !['cpu', 'cuda'].includes(backend as string) ||
    typeof name !== 'string' ||
    typeof bytes !== 'number' ||
    typeof offset !== 'number' ||
    !Array.isArray(shape) ||
    !isDType(dtype)
  )
    refuse('ERR_VALUE', op, `expected what ipcHandle() gave, got ${describeValue(description)}`)
  return description
}
