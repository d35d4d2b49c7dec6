// ONNX models of a few nodes, written as protobuf bytes (onnx.proto3 of the ONNX project names the
// fields and their numbers).

class Message {
  readonly #bytes: number[] = []

  #varint(value: number): void {
    let rest = BigInt.asUintN(64, BigInt(value))
    for (; rest >= 128n; rest >>= 7n) this.#bytes.push(Number(rest & 127n) | 128)
    this.#bytes.push(Number(rest))
  }
  int(field: number, value: number): this {
    this.#varint(field * 8)
    this.#varint(value)
    return this
  }
  float(field: number, value: number): this {
    this.#varint(field * 8 + 5)
    this.#bytes.push(...new Uint8Array(new Float32Array([value]).buffer))
    return this
  }
  #delimited(field: number, bytes: Iterable<number>, length: number): this {
    this.#varint(field * 8 + 2)
    this.#varint(length)
    this.#bytes.push(...bytes)
    return this
  }
  text(field: number, value: string): this {
    const bytes = new TextEncoder().encode(value)
    return this.#delimited(field, bytes, bytes.length)
  }
  message(field: number, value: Message): this {
    return this.#delimited(field, value.#bytes, value.#bytes.length)
  }
  bytes(): Uint8Array {
    return Uint8Array.from(this.#bytes)
  }
}

/** TensorProto.DataType. */
const elementTypes = { float: 1, int64: 7 } as const

export interface Value {
  name: string
  type: keyof typeof elementTypes
  shape: readonly number[]
}

export interface Node {
  op: string
  /** '' is the standard operators' domain. */
  domain?: string
  inputs: readonly string[]
  outputs: readonly string[]
  ints?: Readonly<Record<string, number>>
  floats?: Readonly<Record<string, number>>
  strings?: Readonly<Record<string, string>>
}

export function onnxModel(model: {
  nodes: readonly Node[]
  inputs: readonly Value[]
  outputs: readonly Value[]
}): Uint8Array {
  const graph = new Message()
  for (const node of model.nodes) graph.message(1, nodeMessage(node))
  graph.text(2, 'graph')
  for (const value of model.inputs) graph.message(11, valueMessage(value))
  for (const value of model.outputs) graph.message(12, valueMessage(value))
  const opset = (domain: string, version: number) => new Message().text(1, domain).int(2, version)
  return new Message()
    .int(1, 11) // IR version
    .message(7, graph)
    .message(8, opset('', 23))
    .message(8, opset('com.microsoft', 1))
    .bytes()
}

function nodeMessage(node: Node): Message {
  const out = new Message()
  for (const name of node.inputs) out.text(1, name)
  for (const name of node.outputs) out.text(2, name)
  out.text(4, node.op)
  const attribute = (name: string, type: number) => new Message().text(1, name).int(20, type)
  for (const [name, value] of Object.entries(node.ints ?? {}))
    out.message(5, attribute(name, 2).int(3, value))
  for (const [name, value] of Object.entries(node.floats ?? {}))
    out.message(5, attribute(name, 1).float(2, value))
  for (const [name, value] of Object.entries(node.strings ?? {}))
    out.message(5, attribute(name, 3).text(4, value))
  return out.text(7, node.domain ?? '')
}

function valueMessage({ name, type, shape }: Value): Message {
  const dims = new Message()
  for (const size of shape) dims.message(1, new Message().int(1, size))
  const tensor = new Message().int(1, elementTypes[type]).message(2, dims)
  return new Message().text(1, name).message(2, new Message().message(1, tensor))
}
