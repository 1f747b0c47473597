// A conversation as a tree: an edit or a retry adds a version beside the old one, and nothing is lost.

const STORED = "monoblock.conversation";

export class Conversation {
  constructor() {
    this.clear();
  }

  clear() {
    this.nodes = [{ id: 0, parent: null, children: [], chosen: 0 }];
  }

  get root() {
    return this.nodes[0];
  }

  /** The messages that are shown, from the first to the last. */
  path() {
    const found = [];
    let node = this.root;
    while (node.children.length) {
      node = this.nodes[node.children[node.chosen]];
      found.push(node);
    }
    return found;
  }

  /** The shown messages before a node, which is left out. */
  before(node) {
    const path = this.path();
    return path.slice(0, path.indexOf(node));
  }

  last() {
    return this.path().at(-1) ?? this.root;
  }

  /** A new message after `parent`, as its chosen version. Fields: role, content, ... */
  add(parent, fields) {
    const node = { ...fields, id: this.nodes.length, parent: parent.id, children: [], chosen: 0 };
    this.nodes.push(node);
    parent.children.push(node.id);
    parent.chosen = parent.children.length - 1;
    return node;
  }

  parent(node) {
    return this.nodes[node.parent];
  }

  /** Show another version of a message, `step` further. */
  choose(node, step) {
    const parent = this.parent(node);
    parent.chosen = Math.min(parent.children.length - 1, Math.max(0, parent.chosen + step));
    return this.nodes[parent.children[parent.chosen]];
  }

  /** {index, count} of a message among its versions. */
  versions(node) {
    const { children } = this.parent(node);
    return { index: children.indexOf(node.id), count: children.length };
  }

  /** Keep the conversation for this tab, so that a reload does not lose it. */
  save() {
    try {
      sessionStorage.setItem(STORED, JSON.stringify(this.nodes));
    } catch {
      // The storage is full or switched off; the conversation is still on the page.
    }
  }

  load() {
    try {
      const nodes = JSON.parse(sessionStorage.getItem(STORED));
      if (isTree(nodes)) this.nodes = nodes;
    } catch {
      this.clear();
    }
  }
}

function isTree(nodes) {
  if (!Array.isArray(nodes) || !nodes.length) return false;
  return nodes.every(
    (node, index) =>
      node.id === index &&
      Array.isArray(node.children) &&
      node.children.every((child) => child > index && nodes[child]?.parent === index) &&
      (node.children.length === 0 || (node.chosen >= 0 && node.chosen < node.children.length)) &&
      (index === 0 || (["user", "assistant"].includes(node.role) && typeof node.content === "string")),
  );
}
