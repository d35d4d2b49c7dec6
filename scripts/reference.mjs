// npm run docs: writes docs/api from the comments of the built declarations, one page for each source
// file. Declarations are read by TypeScript's own API, which its version 7 calls unstable: package.json
// and package-lock.json name the version that this works with.
import { mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { basename, dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { SyntaxKind } from 'typescript/unstable/ast'
import * as ast from 'typescript/unstable/ast/is'
import { API, SymbolFlags } from 'typescript/unstable/sync'

const here = dirname(dirname(fileURLToPath(import.meta.url)))

/**
 * @typedef {{ text: string, tags: { name: string, text: string }[] }} Doc a comment: description and tags
 * @typedef {{ name: string, optional: boolean, type: string, doc: Doc }} Field
 * @typedef {{ name: string, signatures: string[], doc: Doc }} Member a method, a getter or a constructor
 * @typedef {{ name: string, kind: 'function' | 'class' | 'const' | 'interface' | 'type', file: string,
 *   signatures: string[], doc: Doc, fields: Field[], members: Member[] }} Export
 */

/** What the package exports, in the order of lib/index.ts. @returns {Export[]} */
export function exportsOf(root = here) {
  const config = join(root, 'test/consumer/tsconfig.json')
  const index = join(root, 'dist/lib/index.d.ts')
  const api = new API({ cwd: root })
  try {
    const project = api.updateSnapshot({ openProjects: [config] }).getProject(config)
    const module = project.checker.getSymbolAtLocation(project.program.getSourceFile(index))
    return project.checker.getExportsOfModule(module).map((symbol) => {
      const declared =
        symbol.flags & SymbolFlags.Alias ? project.checker.getAliasedSymbol(symbol) : symbol
      const nodes = declared.declarations.map((handle) => handle.resolve(project))
      return described(symbol.name, nodes, root)
    })
  } finally {
    api.close()
  }
}

function described(name, nodes, root) {
  const [node] = nodes
  const path = relative(join(root, 'dist'), node.getSourceFile().fileName)
  const body = node.members ? [...node.members].filter(isPublic) : []
  const fields = body.filter(
    (member) => ast.isPropertySignatureDeclaration(member) || ast.isPropertyDeclaration(member),
  )
  const kind = kindOf(node)
  return {
    name,
    kind,
    file: path.replace(/\.d\.ts$/, '.ts'),
    signatures: kind === 'interface' || kind === 'class' ? [headOf(node)] : nodes.map(signatureOf),
    doc: docOf(nodes),
    fields: fields.map((field) => ({
      name: textOf(field.name),
      optional: field.questionToken !== undefined || field.postfixToken !== undefined,
      type: field.type ? textOf(field.type) : '',
      doc: docOf([field]),
    })),
    members: membersOf(body.filter((member) => !fields.includes(member))),
  }
}

function kindOf(node) {
  if (ast.isFunctionDeclaration(node)) return 'function'
  if (ast.isClassDeclaration(node)) return 'class'
  if (ast.isInterfaceDeclaration(node)) return 'interface'
  return ast.isTypeAliasDeclaration(node) ? 'type' : 'const'
}

function isPublic(member) {
  const hidden = (member.modifiers ?? []).some(
    ({ kind }) => kind === SyntaxKind.PrivateKeyword || kind === SyntaxKind.ProtectedKeyword,
  )
  return !hidden && !(member.name && ast.isPrivateIdentifier(member.name))
}

/** Overloads are one member. */
function membersOf(nodes) {
  const all = new Map()
  for (const node of nodes) {
    const name = ast.isConstructorDeclaration(node)
      ? 'constructor'
      : node.name
        ? textOf(node.name)
        : ''
    all.set(name, [...(all.get(name) ?? []), node])
  }
  return [...all].map(([name, same]) => ({
    name,
    signatures: same.map(signatureOf),
    doc: docOf(same),
  }))
}

const textOf = (node) => dedent(node.getText())

const signatureOf = (node) => {
  const whole = ast.isVariableDeclaration(node) ? node.parent.parent : node
  return textOf(whole)
    .replace(/^export /, '')
    .replace(/^declare /, '')
    .replace(/;$/, '')
}

/** An interface or class without its members, which are listed below it. */
const headOf = (node) => {
  const whole = signatureOf(node)
  const at = node.members.pos - node.getStart()
  const from = textOf(node).length - whole.length
  return whole.slice(0, Math.max(0, at - from)).replace(/\s*\{\s*$/, '')
}

/** Later lines of a declaration in a class are indented with it. */
function dedent(text) {
  const [first, ...rest] = text.split('\n')
  const depths = rest.filter((line) => line.trim()).map((line) => line.search(/\S/))
  const depth = depths.length ? Math.min(...depths) : 0
  return [first, ...rest.map((line) => line.slice(depth))].join('\n')
}

/** The comment of the first of some declarations that has one. @returns {Doc} */
function docOf(nodes) {
  for (const node of nodes) {
    const holder = ast.isVariableDeclaration(node) ? node.parent.parent : node
    const comment = [...(holder.jsDoc ?? [])].at(-1)
    if (!comment) continue
    const source = comment.getSourceFile().text.slice(comment.pos, comment.end)
    return parsed(source)
  }
  return { text: '', tags: [] }
}

/** @returns {Doc} */
function parsed(source) {
  const lines = source
    .trim()
    .replace(/^\/\*\*/, '')
    .replace(/\*\/$/, '')
    .split('\n')
    .map((line) => line.replace(/^\s*\* ?/, '').trimEnd())
  const doc = { text: '', tags: [] }
  let fenced = false
  let add = (line) => {
    doc.text += `${line}\n`
  }
  for (const line of lines) {
    const tag = fenced ? null : line.trimStart().match(/^@(\w+)\s?(.*)$/)
    if (line.startsWith('```')) fenced = !fenced
    if (tag) {
      const made = { name: tag[1], text: `${tag[2]}\n` }
      doc.tags.push(made)
      add = (text) => {
        made.text += `${text}\n`
      }
    } else add(line)
  }
  doc.text = doc.text.trim()
  for (const tag of doc.tags) tag.text = tag.text.trim()
  return doc
}

export const tagsOf = ({ tags }, name) => tags.filter((tag) => tag.name === name)

const saysErrors = (doc) =>
  tagsOf(doc, 'throws').length > 0 ||
  tagsOf(doc, 'returns').some(({ text }) => /Never throws/.test(text))

const isValue = ({ kind }) => kind !== 'interface' && kind !== 'type'
const valuesFirst = (a, b) => Number(isValue(b)) - Number(isValue(a))

/** What an export's documentation lacks, in words. @param {Export} item */
export function lacks(item) {
  const out = []
  const without = (where, what) => out.push(`${where}: no ${what}`)
  if (!item.doc.text) without(item.name, 'description')
  if (isValue(item) && tagsOf(item.doc, 'example').length !== 1)
    without(item.name, 'single @example')
  if (item.kind === 'function' && !saysErrors(item.doc)) without(item.name, '@throws, with codes')
  for (const tag of item.doc.tags)
    if (tag.name === 'param' && tag.text.split(' ')[0].includes('.'))
      without(item.name, `interface for @param ${tag.text.split(' ')[0]}`)
  for (const { name, type, doc } of item.fields) {
    const where = `${item.name}.${name}`
    if (type === 'never') continue
    if (!doc.text) without(where, 'description')
    else if (/\bTensor\b/.test(type) && !/\[|shape|\b[Aa]s\b|dimension/.test(doc.text))
      without(where, 'shape')
  }
  for (const { name, doc } of item.members)
    if (!doc.text && !describedByClass(name)) without(`${item.name}.${name}`, 'description')
  return out
}

/** A class's own comment describes how it is made; what a symbol names, the language does. */
const describedByClass = (name) => name === 'constructor' || name.startsWith('[')

const groups = [
  ['Devices, tensors and files', ''],
  ['Operations', 'ops'],
  ['Perceive-to-Reason', 'p2r'],
  ['Vision tower', 'vision'],
]

const pageOf = ({ file }) => `${basename(file, '.ts')}.md`
const anchorOf = (name) => name.toLowerCase()

/** The pages of docs/api, by name. @param {Export[]} all @returns {Map<string, string>} */
export function pagesOf(all, root = here) {
  const links = new Map(all.map((item) => [item.name, `${pageOf(item)}#${anchorOf(item.name)}`]))
  const byFile = new Map()
  for (const item of all) byFile.set(item.file, [...(byFile.get(item.file) ?? []), item])
  const specifications = new Set(readdirSync(join(root, 'ops')))
  const pages = new Map([['README.md', indexPage(byFile, links)]])
  for (const [file, items] of byFile) {
    const specification = `${basename(file, '.ts')}.h`
    const sources = [`[\`${file}\`](../../${file})`]
    if (file.startsWith('lib/ops/') && specifications.has(specification))
      sources.push(`specification: [\`ops/${specification}\`](../../ops/${specification})`)
    const page = [
      `# ${basename(file, '.ts')}`,
      `[Reference](README.md) · source: ${sources.join(' · ')}`,
      ...items.toSorted(valuesFirst).flatMap((item) => sectionOf(item, links)),
    ]
    pages.set(pageOf(items[0]), `${page.join('\n\n')}\n`)
  }
  return pages
}

function indexPage(byFile, links) {
  const lines = [
    '# Reference',
    'Made from the comments in [`lib`](../../lib) by `npm run docs`. Everything is exported by `p2r-kernels`.',
  ]
  for (const [title, folder] of groups) {
    lines.push(`## ${title}`)
    const rows = [...byFile]
      .filter(([file]) => relative('lib', dirname(file)) === folder)
      .toSorted(([a], [b]) => (a < b ? -1 : 1))
      .flatMap(([, items]) => items)
      .filter(isValue)
      .map(
        ({ name, doc }) =>
          `| [\`${name}\`](${links.get(name)}) | ${cell(linked(firstSentence(doc.text), links))} |`,
      )
    lines.push(['| | |', '| --- | --- |', ...rows].join('\n'))
  }
  return `${lines.join('\n\n')}\n`
}

const firstSentence = (text) =>
  text
    .split('\n\n')[0]
    .replaceAll('\n', ' ')
    .replace(/^(.+?)[.:](?: (?=[A-Z]).*)?$/, '$1.')

const cell = (text) =>
  text.replaceAll('\n\n', '<br><br>').replaceAll('\n', ' ').replaceAll('|', '\\|')

/** Names of exports in backticks become links; `<` outside of backticks begins no HTML. */
const linked = (text, links) =>
  text
    .split(/(`[^`]*`)/)
    .map((part) => {
      if (!part.startsWith('`')) return part.replaceAll('<', '&lt;')
      const [, name] = part.match(/^`(\w+)(?:\(\))?`$/) ?? []
      return links.has(name) ? `[${part}](${links.get(name)})` : part
    })
    .join('')

/** A type as code, whose exported names are links. */
function typed(type, links) {
  const escaped = (text) => text.replace(/[&<>|*_[\]`\\{}~]/g, (c) => `&#${c.charCodeAt(0)};`)
  const parts = type
    .replace(/\s+/g, ' ')
    .split(/('[^']*'|\b[A-Za-z]\w*\b)/)
    .map((part) => (links.has(part) ? `[${part}](${links.get(part)})` : escaped(part)))
  return `<code>${parts.join('')}</code>`
}

function sectionOf(item, links) {
  const out = [`## ${item.name}`, declaration(item.signatures)]
  out.push(...bodyOf(item.doc, links))
  const fields = item.fields.filter(({ type }) => type !== 'never')
  if (fields.length)
    out.push(
      [
        '| Field | Type | |',
        '| --- | --- | --- |',
        ...fields.map(({ name, optional, type, doc }) => {
          const [initial] = tagsOf(doc, 'default')
          const text = initial ? `${doc.text}\n\nDefault: ${initial.text}` : doc.text
          const shown = `\`${name}${optional ? '?' : ''}\``
          return `| ${shown} | ${typed(type, links)} | ${cell(linked(text, links))} |`
        }),
      ].join('\n'),
    )
  for (const { name, signatures, doc } of item.members) {
    if (name.startsWith('[')) continue
    out.push(`### ${item.name}.${name}`, declaration(signatures), ...bodyOf(doc, links))
  }
  return out
}

// "declaration" tells the tests that this block is not a program.
const declaration = (signatures) => `\`\`\`ts declaration\n${signatures.join('\n')}\n\`\`\``

function bodyOf(doc, links) {
  const out = doc.text ? [linked(doc.text, links)] : []
  for (const [name, title] of [
    ['param', 'Parameter'],
    ['returns', 'Returns'],
    ['throws', 'Throws'],
    ['default', 'Default'],
  ])
    for (const { text } of tagsOf(doc, name)) out.push(`**${title}** ${linked(text, links)}`)
  for (const { text } of tagsOf(doc, 'example')) {
    const program = text.startsWith('```') ? text : `\`\`\`js\n${text}\n\`\`\``
    out.push(program)
  }
  return out
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const folder = join(here, 'docs/api')
  const all = exportsOf()
  rmSync(folder, { recursive: true, force: true })
  mkdirSync(folder, { recursive: true })
  for (const [name, text] of pagesOf(all)) writeFileSync(join(folder, name), text)
  const missing = all.flatMap(lacks)
  if (missing.length) {
    console.error(missing.join('\n'))
    process.exitCode = 1
  }
}
