import { native } from './native.js'
import { heldBy } from './scope.js'
import { Tensor } from './tensor.js'

/**
 * @internal Runs f as one operation of this name: refusals and faults of the operations in it carry
 * the name, and one fault poisons every tensor that f returns.
 */
export function composite<R extends object>(name: string, f: () => R): R {
  native().beginComposite(name)
  try {
    const result = f()
    for (const part of [...Object.values(result).flat(), ...heldBy(result)])
      if (Tensor.is(part)) Tensor.handle(part).join()
    return result
  } finally {
    native().endComposite()
  }
}
