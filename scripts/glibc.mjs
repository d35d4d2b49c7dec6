// Makes libraries to link against instead of glibc's, so that what is linked runs on glibc 2.28, which
// Node itself needs. They hold the names of all functions and data that 2.28 has, each with the newest
// version it has there, by the compiler's own glibc, which keeps the versions of old. Functions that are
// wanted and that 2.28 has not got are in glibc.cpp.
//
//   node scripts/glibc.mjs COMPILER FOLDER
import { spawnSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

/** The oldest glibc that prebuilds run on. */
export const oldestGlibc = '2.28'

const older = (a, b) => a.localeCompare(b, 'en', { numeric: true }) < 0

function run(command, args) {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  })
  if (error || status !== 0) throw new Error(`${command} failed: ${error?.message ?? stderr}`)
  return stdout
}

/** The dynamic symbols of a library or program; `version` is '' where it has none. */
export function symbolsOf(file, objdump = 'objdump') {
  return [
    ...run(objdump, ['-T', file]).matchAll(/^[0-9a-f]+ (.{7}) (\S+)\t[0-9a-f]+ +(.*?) *(\S+)$/gm),
  ].map(([, flags, section, version, name]) => ({
    name,
    version: version.replace(/^\(?(.*?)\)?$/, '$1').replace('Base', ''),
    defined: section !== '*UND*',
    weak: flags[1] === 'w',
    kind: flags[6] === 'O' ? 'object' : 'function',
  }))
}

/** What a prebuild needs that is not there on the oldest glibc: newer versions, and names of nobody. */
export const tooNew = (symbols) =>
  symbols.filter(({ name, version, defined, weak }) =>
    defined || weak || /^(napi|node_api)_/.test(name)
      ? false
      : version.startsWith('GLIBC_')
        ? older(`GLIBC_${oldestGlibc}`, version)
        : !version.startsWith('GCC_'),
  )

/** Which library of glibc 2.28 has a function that is in libc.so.6 since 2.34. */
const formerLibrary = (name) =>
  /^(pthread|sem)_/.test(name)
    ? 'libpthread.so.0'
    : /^dl/.test(name)
      ? 'libdl.so.2'
      : /^(shm|mq|timer|aio|lio)_/.test(name)
        ? 'librt.so.1'
        : undefined

function makeStubs(compiler, folder) {
  mkdirSync(folder, { recursive: true })
  const objdump = run(compiler, ['-print-prog-name=objdump']).trim()
  const loader = run(compiler, ['-dumpmachine']).startsWith('aarch64')
    ? 'ld-linux-aarch64.so.1'
    : 'ld-linux-x86-64.so.2'
  const stubs = new Map()
  for (const library of ['libc.so.6', 'libm.so.6', loader]) {
    const newest = new Map()
    const path = run(compiler, [`-print-file-name=${library}`]).trim()
    for (const symbol of symbolsOf(path, objdump)) {
      const { name, version, defined } = symbol
      if (
        !defined ||
        name.startsWith('GLIBC_') ||
        !/^GLIBC_[\d.]+$/.test(version) ||
        older(`GLIBC_${oldestGlibc}`, version)
      )
        continue
      if (!newest.has(name) || older(newest.get(name).version, version)) newest.set(name, symbol)
    }
    for (const symbol of newest.values()) {
      const file = formerLibrary(symbol.name) ?? library
      if (!stubs.has(file)) stubs.set(file, [])
      stubs.get(file).push(symbol)
    }
  }
  for (const [file, symbols] of stubs) {
    const path = join(folder, file)
    writeFileSync(
      `${path}.s`,
      symbols
        .map(
          ({ name, kind }) => `.globl ${name}\n.type ${name},%${kind}\n.size ${name},8\n${name}:\n`,
        )
        .join(''),
    )
    const versions = new Map()
    for (const symbol of symbols)
      versions.set(symbol.version, [...(versions.get(symbol.version) ?? []), symbol])
    writeFileSync(
      `${path}.map`,
      [...versions]
        .map(([version, all]) => `${version} { ${all.map(({ name }) => name).join('; ')}; };\n`)
        .join(''),
    )
    const linking = ['-shared', '-nostdlib', `-Wl,-soname,${file},--version-script=${path}.map`]
    run(compiler, [...linking, `${path}.s`, '-o', path])
  }
  // A script of the linker, with everything that follows the objects: libstdc++ by its archive, libgcc
  // from the system, as Node has it, since exceptions cross libraries.
  const libraries = [
    '-l:libstdc++.a',
    '-l:libc_nonshared.a',
    ...[...stubs.keys()].map((file) => join(folder, file)),
  ]
  writeFileSync(join(folder, 'libs.ld'), `GROUP(${[...libraries, '-lgcc_s', '-lgcc'].join(' ')})\n`)
  writeFileSync(
    join(folder, 'exports.map'),
    '{ global: napi_register_module_v1; node_api_module_get_api_version_v1; local: *; };\n',
  )
}

if (resolve(process.argv[1] ?? '') === fileURLToPath(import.meta.url)) {
  const [compiler, folder] = process.argv.slice(2)
  if (!compiler || !folder) {
    console.error('usage: node scripts/glibc.mjs COMPILER FOLDER')
    process.exit(2)
  }
  makeStubs(compiler, resolve(dirname(folder), folder))
}
