/** The closed list of reasons for which the library refuses or fails. */
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
 * Every error that the library throws. Wrong type or value: ERR_VALUE; rank or size: ERR_SHAPE;
 * unreadable file: ERR_IO with its cause; bad content: ERR_FORMAT. Messages read
 * `[operation] what, expected, got`.
 */
export class P2RError extends Error {
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
