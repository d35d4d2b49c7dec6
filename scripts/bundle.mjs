// Puts the library's modules, of which tsc writes one for each source, into one file: Node.js opens the
// modules of an import one after another, and a hundred of them take more than twice as long as one. A
// module that is imported from outside the library keeps its path, as a list of exports of that file: the
// package's entries, and what benches, examples and tests reach. Declarations stay as tsc wrote them.
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join, relative, resolve } from 'node:path'
import { rolldown } from 'rolldown'
import { root } from './addon.mjs'

const library = join(root, 'dist/lib')

const filesBelow = (folder, pattern) =>
  readdirSync(folder, { recursive: true })
    .filter((name) => pattern.test(name))
    .map((name) => join(folder, name))

/** The modules of the library that the files import by a path. */
const importedBy = (importers) =>
  importers.flatMap((importer) =>
    [...readFileSync(importer, 'utf8').matchAll(/'(\.{1,2}\/[\w./-]+\.js)'/g)]
      .map(([, path]) => resolve(dirname(importer), path))
      .filter((path) => path.startsWith(join(library, '/'))),
  )

export const importedByTests = () => [
  ...new Set(importedBy(filesBelow(join(root, 'test'), /\.(ts|mjs)$/))),
]

/** Replaces the modules in dist/lib by their bundle. */
export async function bundle() {
  const { exports, bin } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
  const entries = new Set([
    ...[exports['.'].default, ...Object.values(bin)].map((path) => join(root, path)),
    ...importedByTests(),
    ...importedBy(
      ['bench', 'examples', 'reliability'].flatMap((name) =>
        filesBelow(join(root, 'dist', name), /\.js$/),
      ),
    ),
  ])
  const modules = filesBelow(library, /\.js$/)
  const build = await rolldown({
    input: Object.fromEntries(
      [...entries].map((path) => [relative(library, path).slice(0, -'.js'.length), path]),
    ),
    cwd: root,
    platform: 'node',
    external: (id) => !/^[./]/.test(id),
    preserveEntrySignatures: 'strict',
  })
  const { output } = await build.generate({
    format: 'esm',
    entryFileNames: '[name].js',
    chunkFileNames: '[name].js',
    minifyInternalExports: false,
    comments: { jsdoc: false },
    // Beside index.js, since lib/native.ts finds the package from where it is.
    codeSplitting: { groups: [{ name: 'library', test: /[\\/]dist[\\/]lib[\\/](?!cli[\\/])/ }] },
  })
  await build.close()
  for (const path of modules) rmSync(path)
  for (const { fileName, code } of output) writeFileSync(join(library, fileName), code)
}
