// Packs a folder of reference data for the tests: each of its subfolders becomes one file
// test/golden/<family>.br, a brotli stream of
//
//   u32     length of the index in bytes, little-endian
//   JSON    { "path": [offset, bytes], ... }, paths relative to the folder and sorted
//   bytes   the files, one after another; offsets count from here
//
// The data and how it was made are described in test/golden/README.md. Run by hand, when the data
// changes:
//
//   node scripts/pack-golden.mjs ../shared/golden
//
// Notes (*.md) are left out.
import { mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join, relative, sep } from 'node:path'
import { fileURLToPath } from 'node:url'
import { brotliCompressSync, constants } from 'node:zlib'

const from = process.argv[2]
if (!from) {
  console.error(
    'pack-golden: expected a folder, as in: node scripts/pack-golden.mjs ../shared/golden',
  )
  process.exit(1)
}
const to = fileURLToPath(new URL('../test/golden', import.meta.url))
mkdirSync(to, { recursive: true })

function* filesIn(folder) {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name)
    if (entry.isDirectory()) yield* filesIn(path)
    else if (!path.endsWith('.md')) yield path
  }
}

let total = 0
for (const family of readdirSync(from)
  .filter((name) => statSync(join(from, name)).isDirectory())
  .sort()) {
  const index = {}
  const parts = []
  let offset = 0
  const paths = new Map(
    [...filesIn(join(from, family))].map((f) => [relative(from, f).split(sep).join('/'), f]),
  )
  for (const path of [...paths.keys()].sort()) {
    const bytes = readFileSync(paths.get(path))
    index[path] = [offset, bytes.length]
    parts.push(bytes)
    offset += bytes.length
  }
  const json = Buffer.from(JSON.stringify(index))
  const length = Buffer.alloc(4)
  length.writeUInt32LE(json.length)
  const packed = brotliCompressSync(Buffer.concat([length, json, ...parts]), {
    params: { [constants.BROTLI_PARAM_QUALITY]: 11, [constants.BROTLI_PARAM_LGWIN]: 24 },
  })
  writeFileSync(join(to, `${family}.br`), packed)
  total += packed.length
  console.log(`${family}: ${parts.length} files, ${offset} bytes, packed ${packed.length}`)
}
console.log(`${total} bytes in all`)
