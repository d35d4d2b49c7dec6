// What was built is told from what is out of date by content, not by time: a stamp holds a hash over
// all that went in.
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { root } from './addon.mjs'

/** A hash over the names and contents of the files in the folders whose names match, and over the salt. */
export function digest(folders, pattern, ...salt) {
  const hash = createHash('sha256').update(JSON.stringify(salt))
  for (const folder of folders) {
    const path = join(root, folder)
    if (!existsSync(path)) continue
    const names = pattern.test(folder) ? [''] : readdirSync(path, { recursive: true }).sort()
    for (const name of names)
      if (name === '' || pattern.test(name))
        hash.update(`${folder}/${name}\0`).update(readFileSync(join(path, name)))
  }
  return hash.digest('hex')
}

const sources = [
  'ops',
  'cpu',
  'cuda',
  'binding',
  'test/twin',
  'CMakeLists.txt',
  'Makefile',
  'scripts/glibc.cpp',
  'scripts/glibc.mjs',
]

/** The digest of the addon's sources, for what else it depends on. */
export const addonKey = (...salt) =>
  digest(sources, /(\.(h|cpp|cc|cu|cuh|def)|CMakeLists\.txt|Makefile|glibc\.mjs)$/, ...salt)

/** Runs step unless the stamp holds one of the keys; it holds the first of them afterwards. */
export async function upToDate(stamp, keys, products, step) {
  const file = join(root, 'build', `${stamp}.stamp`)
  const done = existsSync(file) && keys.includes(readFileSync(file, 'utf8'))
  if (done && products.every((p) => existsSync(join(root, p)))) return
  rmSync(file, { force: true })
  await step()
  mkdirSync(dirname(file), { recursive: true })
  writeFileSync(file, keys[0])
}
