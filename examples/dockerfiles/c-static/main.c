/* wordfreq prints the most frequent words of its standard input. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BUCKETS = 1 << 14, WORD_MAX_LEN = 64 };

struct entry {
	char word[WORD_MAX_LEN];
	unsigned long count;
	struct entry *next;
};

static struct entry *table[BUCKETS];
static size_t distinct;

static unsigned hash(const char *s)
{
	unsigned h = 2166136261u;
	while (*s)
		h = (h ^ (unsigned char)*s++) * 16777619u;
	return h & (BUCKETS - 1);
}

static void add(const char *word)
{
	struct entry **slot = &table[hash(word)];
	for (struct entry *e = *slot; e; e = e->next) {
		if (strcmp(e->word, word) == 0) {
			e->count++;
			return;
		}
	}
	struct entry *e = calloc(1, sizeof *e);
	if (!e) {
		perror("wordfreq");
		exit(1);
	}
	strcpy(e->word, word);
	e->count = 1;
	e->next = *slot;
	*slot = e;
	distinct++;
}

/* By count, most frequent first; equal counts in alphabetical order. */
static int compare(const void *a, const void *b)
{
	const struct entry *x = *(struct entry *const *)a, *y = *(struct entry *const *)b;
	if (x->count != y->count)
		return x->count < y->count ? 1 : -1;
	return strcmp(x->word, y->word);
}

int main(int argc, char **argv)
{
	size_t top = argc > 1 ? strtoul(argv[1], NULL, 10) : 10;
	char word[WORD_MAX_LEN];
	size_t n = 0;

	for (int c; ; ) {
		c = getchar();
		if (c != EOF && isalpha(c)) {
			if (n < sizeof word - 1)
				word[n++] = (char)tolower(c);
			continue;
		}
		if (n) {
			word[n] = '\0';
			add(word);
			n = 0;
		}
		if (c == EOF)
			break;
	}

	struct entry **all = calloc(distinct ? distinct : 1, sizeof *all);
	if (!all) {
		perror("wordfreq");
		return 1;
	}
	size_t i = 0;
	for (size_t b = 0; b < BUCKETS; b++)
		for (struct entry *e = table[b]; e; e = e->next)
			all[i++] = e;
	qsort(all, distinct, sizeof *all, compare);
	for (i = 0; i < distinct && i < top; i++)
		printf("%lu %s\n", all[i]->count, all[i]->word);
	free(all);
	return 0;
}
