// Reads the order of instructions in the machine code of kernels that multiply by wgmma: how many of
// their exponentials stand where a product is in flight, and so run beside it. ptxas may move the wait
// for a product above them, and reports nothing. No disassembler is needed: an instruction has 16
// bytes, and its opcode is in its lowest 9 bits.

// MUFU computes several functions: the exponential is number 2. WARPGROUP is both the fence before
// products (ARRIVE) and the wait for all but n groups of them (DEPBAR).
const MUFU = 0x108
const HGMMA = 0x1f0
const WARPGROUP = 0x1c5

/** Each kernel's instructions of interest, in order: 'ex2', 'wgmma', 'fence' or the n of a wait. */
function* kernelsIn(cubin) {
  const sections = Number(cubin.readBigUInt64LE(0x28))
  const section = (i) => ({
    name: cubin.readUInt32LE(sections + 64 * i),
    start: Number(cubin.readBigUInt64LE(sections + 64 * i + 24)),
    size: Number(cubin.readBigUInt64LE(sections + 64 * i + 32)),
  })
  const names = section(cubin.readUInt16LE(0x3e)).start
  for (let i = 0; i < cubin.readUInt16LE(0x3c); i++) {
    const { name, start, size } = section(i)
    const end = cubin.indexOf(0, names + name)
    const [, symbol] = cubin.toString('latin1', names + name, end).match(/^\.text\.(.+)/) ?? []
    if (!symbol) continue
    const found = []
    for (let at = start; at < start + size; at += 16) {
      const opcode = cubin.readUInt16LE(at) & 0x1ff
      const modifiers = cubin.readUInt32LE(at + 8)
      if (opcode === MUFU && ((modifiers >> 10) & 15) === 2) found.push('ex2')
      else if (opcode === HGMMA) found.push('wgmma')
      else if (opcode === WARPGROUP)
        found.push(modifiers & 0x10000 ? (modifiers >> 8) & 0xff : 'fence')
    }
    yield [symbol, found]
  }
}

/** The same of PTX, in the order of the text. */
function* kernelsInPtx(ptx) {
  for (const text of ptx.split(/^(?=.*\.entry )/m)) {
    const symbol = text.match(/\.entry (\w+)/)?.[1]
    if (!symbol) continue
    const found = text.matchAll(
      /(ex2)\.approx|(wgmma)\.mma_async|wgmma\.(fence)|wgmma\.wait_group\S* (\d+)/g,
    )
    yield [symbol, [...found].map(([, ex2, mma, fence, n]) => ex2 ?? mma ?? fence ?? Number(n))]
  }
}

/**
 * Of the kernels with wgmma in a cubin: [symbol, the share of exponentials in whose place a product
 * is in flight]. Throws if the cubin has not as many of each instruction as the PTX that it was made of,
 * that is, if the opcodes above are not those of this toolkit.
 */
export function overlaps(cubin, ptx) {
  const written = new Map(kernelsInPtx(ptx))
  return [...kernelsIn(cubin)].flatMap(([symbol, found]) => {
    const [read, wrote] = [found, written.get(symbol) ?? []].map((all) => [...all].sort().join())
    if (read !== wrote)
      throw new Error(`${symbol}: the machine code reads as ${read}, and the PTX has ${wrote}`)
    if (!found.includes('wgmma')) return []
    let inFlight = false
    let overlapped = 0
    for (const what of found) {
      if (what === 'ex2') overlapped += inFlight ? 1 : 0
      else if (what !== 'fence') inFlight = what !== 0
    }
    return [[symbol, overlapped / found.filter((what) => what === 'ex2').length]]
  })
}
