/**
 * The closed list of reasons for which the library refuses or fails.
 *
 * ERR_VALUE: an argument of the wrong kind or value. ERR_SHAPE, ERR_DTYPE: a tensor, or data, of the wrong
 * shape or type. ERR_DEVICE: a device that is not available, or tensors of different devices. ERR_MEMORY:
 * the device or host has no memory left. ERR_CUDA: CUDA failed; its device is lost. ERR_DISPOSED: used after dispose.
 * ERR_NATIVE: the addon, or another package, could not be loaded. ERR_POLICY: a policy, such as a served
 * model, failed or answered wrongly. ERR_FORMAT: a file's or answer's content. ERR_IO: a file that cannot be
 * read or written; `cause` is the system's error.
 */
export type ErrorCode =
  | 'ERR_SHAPE'
  | 'ERR_DTYPE'
  | 'ERR_VALUE'
  | 'ERR_DEVICE'
  | 'ERR_MEMORY'
  | 'ERR_CUDA'
  | 'ERR_DISPOSED'
  | 'ERR_NATIVE'
  | 'ERR_POLICY'
  | 'ERR_FORMAT'
  | 'ERR_IO'

/**
 * Every error that the library throws. Messages read `[operation] what, expected, got`.
 *
 * @example
 * ```js
 * import { add, openDevice, P2RError } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * try {
 *   add({ x: device.zeros([2]), y: device.zeros([3]) })
 * } catch (error) {
 *   if (error instanceof P2RError) console.log(error.code, error.op) // ERR_SHAPE add
 * }
 * device.dispose()
 * ```
 */
export class P2RError extends Error {
  /** Why, from a closed list. */
  readonly code: ErrorCode
  /** The exported function that refused, for example 'attention'. */
  readonly op?: string

  constructor(code: ErrorCode, message: string, options?: { op?: string; cause?: unknown }) {
    super(message, options && 'cause' in options ? { cause: options.cause } : undefined)
    this.name = 'P2RError'
    this.code = code
    if (options?.op !== undefined) this.op = options.op
  }
}

/** Throws a P2RError with the operation in front of the message. */
export function refuse(
  code: ErrorCode,
  op: string,
  message: string,
  options?: { cause?: unknown },
): never {
  throw new P2RError(code, `[${op}] ${message}`, { op, ...options })
}
